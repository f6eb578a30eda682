"""Settings: what beats what, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from daemon.__main__ import main
from daemon.config import TOKEN_VARIABLE, ConfigError, Engine, Settings, describe, load, needs_restart
from daemon.config_command import json_schema, plain
from daemon.page.guard import Access


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "rescan.toml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_beat_the_file_which_beats_the_defaults(tmp_path: Path) -> None:
    """A flag wins over the file; what neither names keeps its default; each knows its origin."""
    file = write(tmp_path, '[dicom]\nport = 104\nae_title = "FILE"\n')
    effective = load(file, {"dicom.ae_title": "FLAG"})
    assert (effective.settings.dicom.port, effective.settings.dicom.ae_title) == (104, "FLAG")
    assert effective.settings.http.port == 8080
    assert effective.origins == {"dicom.port": "file", "dicom.ae_title": "flag"}


def test_the_documented_defaults_hold() -> None:
    """The addresses that others rely on, without any setting."""
    s = Settings()
    assert (s.dicom.host, s.dicom.port, s.dicom.ae_title) == ("127.0.0.1", 11112, "RESCAN")
    assert (s.events.publish, s.events.replay) == ("tcp://127.0.0.1:5556", "tcp://127.0.0.1:5557")
    assert (s.http.host, s.http.port, s.model.engine) == ("127.0.0.1", 8080, Engine.AUTO)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[dicom]\nprot = 1", "dicom.prot: unknown key; did you mean port?"),
        ("[dicmo]\nport = 1", "dicmo: unknown key; did you mean dicom?"),
        ("[zzz]\nport = 1", "zzz: unknown key; known here: alerts"),
        ("[dicom]\nport = 70000", "dicom.port: got 70000; it must be from 0 to 65535"),
        ("[dicom]\nport = true", "dicom.port: got True; expected int"),
        ('[dicom]\nport = "x"', "dicom.port: got 'x'; expected int"),
        ("dicom = 3", "dicom: got 3; it must be a table, written [dicom]"),
        ('[model]\nengine = "tpu"', "model.engine: got 'tpu'; use one of auto, tensorrt, cuda, openvino, cpu"),
        (
            "[completeness]\nquiet_final_s = 1",
            "completeness.quiet_final_s: got 1, below quiet_provisional_s = 5; raise it",
        ),
        ("[completeness]\nquiet_final_s = nan", "completeness.quiet_final_s: got nan; it must be"),
        ("[[scanners]]\nslug = 'mr1'", "scanners[0].ae_title: missing"),
        ("[[scanners]]\nslug = 'MR 1'\nae_title = 'A'\naddress = '10.0.0.1'", "scanners[0].slug: got 'MR 1'"),
        ("[[scanners]]\nslug = 'unknown'\nae_title = 'A'\naddress = '10.0.0.1'", "scanners[0].slug: got 'unknown'"),
        ("[[scanners]]\nslug = 'a'\nae_title = 'A'\naddress = 'ten'", "scanners[0].address: got 'ten'"),
        ("scanners = 3", "scanners: got 3; it must be a list"),
        ('[events]\npublish = "udp://x"', "events.publish: got 'udp://x'; write it as tcp://HOST:PORT"),
        ('[dicom]\nae_title = ""', "dicom.ae_title: got ''"),
        ("[dicom\n", "not TOML"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line_with_value_and_remedy(tmp_path: Path, text: str, words: str) -> None:
    """Each mistake names its key, the value and what to write instead."""
    assert words in refusal(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The path stands in the message."""
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot read the configuration"):
        load(tmp_path / "absent.toml")


def test_a_door_to_the_network_needs_a_list_of_scanners(tmp_path: Path) -> None:
    """Bound to more than loopback without an allow-list, nothing starts, and the message shows an entry to write."""
    assert '[[scanners]] slug = "mr1"' in refusal(tmp_path, '[dicom]\nhost = "0.0.0.0"')
    scanner = '[[scanners]]\nslug = "mr1"\nae_title = "MR"\naddress = "10.1.2.3"\n'
    assert load(write(tmp_path, f'{scanner}[dicom]\nhost = "0.0.0.0"')).settings.dicom.host == "0.0.0.0"


def test_events_and_page_off_loopback_need_protection(tmp_path: Path) -> None:
    """Plain events and a page without a token are refused off loopback."""
    assert "rescan keys new" in refusal(tmp_path, '[events]\npublish = "tcp://0.0.0.0:5556"')
    assert "http.token_file" in refusal(tmp_path, '[http]\nhost = "0.0.0.0"')


def test_a_scanner_stands_once(tmp_path: Path) -> None:
    """Two entries of one name, or of one caller, are refused."""
    one = '[[scanners]]\nslug = "{}"\nae_title = "MR"\naddress = "10.1.2.3"\n'
    assert "'mr1' stands twice" in refusal(tmp_path, one.format("mr1") * 2)
    assert "'MR at 10.1.2.3' stands twice" in refusal(tmp_path, one.format("mr1") + one.format("mr2"))


def test_every_setting_has_a_help_text_and_a_range_that_holds_its_default() -> None:
    """Described once, for `rescan config`, the schema and the docs."""
    for d in describe():
        assert d.help, d.path
        if isinstance(d.default, int | float) and not isinstance(d.default, bool):
            assert d.low is None or d.low <= d.default, d.path
            assert d.high is None or d.default <= d.high, d.path


def test_the_schema_accepts_the_defaults_and_refuses_unknown_keys() -> None:
    """The JSON Schema is made from the same types."""
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(
        {"dicom": {"port": 104}, "scanners": [{"slug": "a", "ae_title": "A", "address": "1.2.3.4"}]}
    )
    assert not validator.is_valid({"dicom": {"prot": 104}})
    assert not validator.is_valid({"scanners": [{"slug": "a"}]})
    json.dumps(plain(Settings()))


def test_only_live_settings_change_without_a_restart(tmp_path: Path) -> None:
    """A port needs a restart, a retention time does not."""
    old = load(write(tmp_path, "")).settings
    new = load(write(tmp_path, "[dicom]\nport = 1\n[spool]\nretention_s = 5\n")).settings
    assert needs_restart(old, new) == ["dicom.port"]


SCANNER = '[[scanners]]\nslug = "mr1"\nae_title = "MR"\naddress = "10.1.2.3"\nalerts = "{}"\n'


def test_a_scanner_leaves_shadow_mode_without_a_restart(tmp_path: Path) -> None:
    """Its alerts and its label are live; its address is not, and a scanner more needs a restart."""
    old = load(write(tmp_path, SCANNER.format("shadow"))).settings
    assert needs_restart(old, load(write(tmp_path, SCANNER.format("on"))).settings) == []
    moved = SCANNER.format("shadow").replace("10.1.2.3", "10.1.2.4")
    assert needs_restart(old, load(write(tmp_path, moved)).settings) == ["scanners[0].address"]
    more = SCANNER.format("shadow") + SCANNER.format("on").replace("mr1", "mr2").replace('"MR"', '"MR2"')
    assert needs_restart(old, load(write(tmp_path, more)).settings) == ["scanners"]


def test_what_config_prints_is_a_file_that_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed file gives the same settings again, also where scanners and rules are set."""
    rule = "[[rules]]\nname = \"t1\"\ndescription = '(?i)t1\\b'\nattributes = { StationName = '(?i)mr' }\nslices = [64, 512]\n"
    for text in ("", SCANNER.format("shadow") + rule):
        file = write(tmp_path, text)
        assert main(["config", "--config", str(file)]) == 0
        printed = tmp_path / "printed.toml"
        printed.write_text(capsys.readouterr().out, encoding="utf-8")
        assert load(printed).settings == load(file).settings
        assert main(["check", "--no-ports", str(printed)]) == 0


def test_the_page_token_may_come_from_the_environment_and_is_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It opens the door off loopback; `rescan config` and the settings do not show it; a short one is refused unseen."""
    file = write(tmp_path, '[http]\nhost = "0.0.0.0"\ntls_at_proxy = true\n')
    monkeypatch.setenv(TOKEN_VARIABLE, "correct-horse-battery")
    settings = load(file).settings
    assert Access.from_settings(settings.http).opens("correct-horse-battery")
    assert main(["config", "--config", str(file), "--json"]) == 0
    assert "correct-horse" not in capsys.readouterr().out + repr(settings)
    monkeypatch.setenv(TOKEN_VARIABLE, "short-secret")
    with pytest.raises(ConfigError) as caught:
        Access.from_settings(settings.http)
    assert "short-secret" not in str(caught.value)
