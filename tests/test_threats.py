"""SECURITY.md and the code that it speaks of: what runs code or leaves a folder is in no source, and every test that
the list of threats names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("hlip", "hlip_kernels", "train", "bench", "examples", "docs")
SOURCES = [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
    "shelve.open", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "torch.jit.load",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package.PackageImporter", "joblib.load",
    "pandas.read_pickle", "numpy.lib.format.read_array",
}  # fmt: skip
LEAVES_FOLDERS = {"extract", "extractall", "unpack_archive"}
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
REFUSED = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def dangers(source: str) -> Iterator[str]:
    """What a source does that no reader of foreign files may do, with its line."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {each.arg: each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
        if name in RUNS_CODE or name.rpartition(".")[2] in LEAVES_FOLDERS:
            yield f"line {node.lineno}: {name}"
        key, value = NEEDED.get(name, ("", None))
        if key and given.get(key) is not value:
            yield f"line {node.lineno}: {name} without {key}={value}"
        else:
            yield from (f"line {node.lineno}: {key}={given[key]}" for key in REFUSED if given.get(key) is REFUSED[key])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "np.load(path)", "np.load(path, allow_pickle=True)", "subprocess.run(line, shell=True)", "os.system(line)",
        "eval(text)", "pickle.load(file)", "pickle.Unpickler(file).load()", "yaml.load(text, Loader)",
        "zipfile.ZipFile(path).extractall(folder)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_what_runs_code_is_seen(line: str) -> None:
    assert len(list(dangers(line))) == 1


def test_only_plain_values_are_read_from_yaml() -> None:
    """The one loader of YAML is PyYAML's safe one."""
    bases = [ast.unparse(base) for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.ClassDef) for base in node.bases]  # fmt: skip
    assert [base for base in bases if "Loader" in base] == ["yaml.SafeLoader"]


def threats() -> list[tuple[str, str]]:
    """(threat, test) for each test that a row of the table names."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\|[^-]", line)][1:]
    return [(row[0].strip(), test) for row in rows for test in re.findall(r"`([^`]+)`", row[2]) or [""]]


@pytest.mark.parametrize(("threat", "test"), threats(), ids=lambda text: text)
def test_every_threat_has_a_test(threat: str, test: str) -> None:
    """The test exists, and where one of its parameters is named, that too."""
    file, _, name = test.partition("::")
    name, _, parameter = name.rstrip("]").partition("[")
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    functions = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert name in functions, f"{threat}: no test {name} in {file}"
    assert not parameter or f'"{parameter}"' in source, f"{threat}: {name} has no case {parameter!r}"
