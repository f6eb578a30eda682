"""What the page's tests share: a store in memory, a phantom with pictures, and a real browser."""
