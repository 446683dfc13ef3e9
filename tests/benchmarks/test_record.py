"""What is recorded of benchmarks that work and of those that fail."""

import sys
from pathlib import Path

import pytest
import record

PRINTS_THEN_FAILS = "import sys; print('a row'); sys.exit('the next row failed')"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `record.main` adds to; nothing is measured."""
    file = tmp_path / "RESULTS.md"
    file.write_text("# Results\n\n## old\n", encoding="utf-8")
    monkeypatch.setattr(record, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(record, "conditions", lambda: "One machine.")
    monkeypatch.setattr(sys, "argv", ["record.py", "--only", "kernels", "--results", str(file)])
    return file


def python(code: str) -> record.Output:
    return record.run([sys.executable, "-c", code])


def test_what_a_command_prints_is_shown_and_kept(capfd: pytest.CaptureFixture[str]) -> None:
    output = python(PRINTS_THEN_FAILS)
    assert output.text == "a row\n"
    assert output.failure == "status 1, the next row failed"
    shown = capfd.readouterr()
    assert "a row" in shown.out
    assert "the next row failed" in shown.err
    assert python("print('fine')").failure == ""
    assert python("raise SystemExit(3)").failure == "status 3, it said nothing"


def test_a_section_comes_before_the_others(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "kernels", lambda: python("print('a row')"))
    record.main()
    text = results.read_text(encoding="utf-8")
    assert text.index("a row") < text.index("## old")
    assert "Failed" not in text


def test_what_was_measured_before_a_failure_is_recorded(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "kernels", lambda: python(PRINTS_THEN_FAILS))
    with pytest.raises(SystemExit) as ended:
        record.main()
    assert "the next row failed" in str(ended.value)
    text = results.read_text(encoding="utf-8")
    assert "a row" in text
    assert "Failed: " in text and "status 1, the next row failed" in text


def test_nothing_is_recorded_of_what_printed_nothing(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results.read_text(encoding="utf-8")
    monkeypatch.setattr(record, "kernels", lambda: python("raise SystemExit('no GPU')"))
    with pytest.raises(SystemExit, match="nothing was recorded") as ended:
        record.main()
    assert "no GPU" in str(ended.value)
    assert results.read_text(encoding="utf-8") == before
