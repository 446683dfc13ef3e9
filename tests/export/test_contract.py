"""What the exporter says of a program and what the runner reads are stated once on each side: equally."""

import re
from pathlib import Path

from qwen_runner.export import contract

RUNNER = Path(__file__).resolve().parents[2] / "runner"


def constants(header: str) -> dict[str, str]:
    """Those of a C++ header by name, without quotes."""
    text = (RUNNER / header).read_text()
    return dict(re.findall(r"^inline constexpr [^=]*?(\w+) = \"?([^\";]*)\"?;", text, re.MULTILINE))


def test_the_runner_states_the_same() -> None:
    manifest = constants("manifest.h")
    assert manifest["kProgramFormatVersion"] == str(contract.FORMAT_VERSION)
    assert manifest["kManifestFile"] == contract.MANIFEST_FILE
    assert manifest["kInt4Layout"] == contract.INT4_TILES
    assert manifest["kMaxBatch"] == str(contract.MAX_BATCH)
    assert constants("delegate.h")["kDelegateName"] == contract.BACKEND_ID
    files = re.findall(r'constexpr const char\* k\w+File = "(.*)";', (RUNNER / "program.cpp").read_text())
    assert files == [contract.PROGRAM_FILE, contract.WEIGHTS_FILE, contract.TOKENIZER_FILE]
    methods = re.findall(r'Method::load\(\*program, "(\w+)"', (RUNNER / "program.cpp").read_text())
    assert tuple(methods) == contract.methods(contract.MAX_BATCH)


def test_the_runner_gives_inputs_in_the_same_order() -> None:
    for source in ("host_steps.cpp", "cuda_lane.cpp"):
        text = (RUNNER / source).read_text()
        # The columns of a GPU's step name what they hold; a host's step says it beside each.
        columns = r"(?:integer|number)\(\d\) = .*?(\w+)\)?;"
        names = re.findall(columns, text) or re.findall(r"\);\s+// (\w+)", text)
        assert names == list(contract.ROW_INPUTS), source
