"""Private parts of other libraries: in `echo_trainer.compat` only, and named when they are gone."""

import ast
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from paths import ROOT
from training import echo_trainer
from trl import SFTTrainer

from echo_trainer import EchoSFTTrainer, cli
from echo_trainer.compat import checkpointing, hub_client, versions
from echo_trainer.compat.cache import KeyValueRecord, NoCacheError, PrefixCache
from echo_trainer.compat.trainer import _JOINTS, require_joints
from echo_trainer.method.plan import make_plan
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.echo import SUFFIX
from echo_trainer.passes.layers import decoder_layers

PACKAGE = ROOT / "echo_trainer"
OURS = {"_fields", "_asdict", "_replace", "_exit"}  # of namedtuple and of the standard library
# Not public, though they have no underscore.
INTERNAL = {
    "aux_loss_enabled", "check_target_module_exists", "dataloader_config", "get_pattern_key",
    "load_balancing_loss_func", "ParamWrapper", "set_zero3_state",
}  # fmt: skip


def modules():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def defined_by_us(trees):
    """Every underscored name that our own code defines."""
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            names.add(part.id)
                        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                            names.add(part.attr if part.value.id in ("self", "cls") else "")
    return names


def touched(tree):
    """(line, name) of everything that looks private or internal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id if node.id in INTERNAL else ""
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, alias.name) for alias in node.names)
            yield from ((node.lineno, part) for part in (node.module or "").split("."))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            name = node.args[1] if len(node.args) > 1 else None
            yield node.lineno, name.value if isinstance(name, ast.Constant) else ""


def private(name):
    return (name.startswith("_") and not name.endswith("__")) or name in INTERNAL


def test_only_compat_touches_private_parts():
    trees = modules()
    own = defined_by_us(trees) | OURS
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in trees.items()
        if "compat" not in path.parts
        for line, name in touched(tree)
        if private(name) and name not in own
    ]
    assert not found, "move these to echo_trainer/compat, with the reason: " + ", ".join(found)


def test_no_method_of_ours_overrides_a_private_one():
    """Overriding a private method is touching it; `compat.trainer` gives each a public name."""
    inherited = {name for name in dir(SFTTrainer) if name.startswith("_") and not name.startswith("__")}
    found = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, tree in modules().items()
        if "compat" not in path.parts
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef) and ("Trainer" in cls.name or "Mixin" in cls.name)
        for node in cls.body
        if isinstance(node, ast.FunctionDef) and node.name in inherited
    ]
    assert not found


def test_the_search_finds_what_it_should():
    lines = ("x._hidden", "getattr(x, '_name')", "from lib._inner import y", "from lib import _z", "y.ParamWrapper")
    tree = ast.parse("\n".join(lines))
    found = {name for _, name in touched(tree) if private(name)}
    assert found == {"_hidden", "_name", "_inner", "_z", "ParamWrapper"}


def test_every_module_of_compat_says_what_it_takes():
    table = (PACKAGE / "compat" / "__init__.py").read_text()
    for path in (PACKAGE / "compat").glob("[a-z]*.py"):
        assert f"| `{path.stem}` |" in table
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        if path.stem != "versions":
            assert "rivate" in docstring or "Not public" in docstring
            assert re.search(r"5\.2\d|0\.21|1\.1\d|2\.4|2\.13", docstring), f"{path.name} names no version"


def test_a_joint_that_is_gone_is_named_at_construction(tmp_path, monkeypatch):
    class Moved(SFTTrainer):
        _run_epoch = None

    with pytest.raises(RuntimeError, match=r"_run_epoch of trl\.SFTTrainer"):
        require_joints(Moved)
    require_joints()
    monkeypatch.delattr("transformers.Trainer._load_best_model")
    with pytest.raises(RuntimeError, match="_load_best_model"):
        echo_trainer(tmp_path)
    assert not list(tmp_path.iterdir())


def test_joints_are_overridden_and_called(tmp_path):
    """Each private method that is listed is one of the trainer's, and ours stands in its place."""
    assert len(set(_JOINTS)) == len(_JOINTS)
    for name in _JOINTS:
        assert getattr(EchoSFTTrainer, name) is not getattr(SFTTrainer, name)


def test_checkpointing_that_is_not_known_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "_replays", lambda: False)
    with pytest.raises(ValueError, match="checkpoints decoder layers in another way"):
        echo_trainer(tmp_path)
    echo_trainer(tmp_path / "without", gradient_checkpointing=False)

    def renamed():
        raise AttributeError("no attribute '_gradient_checkpointing_func'")

    monkeypatch.setattr(checkpointing, "_replays", renamed)
    with pytest.raises(ValueError, match="_gradient_checkpointing_func"):
        echo_trainer(tmp_path)


def test_layers_checkpointed_by_others_are_refused(tmp_path):
    """Replayed without what the echo adds, their gradients would be wrong without a word."""
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"Linear.*are not checkpointed by transformers"):
        checkpointing.require_replay(layers)
    trainer = echo_trainer(tmp_path)
    checkpointing.require_replay(decoder_layers(trainer.model))


def test_a_cache_asked_for_more_says_so():
    segments = find_segments({"labels": torch.tensor([[-100, 5, 6]])})
    part = make_plan(segments, [True], form=SUFFIX).layout.parts[0]
    record = KeyValueRecord([part], first_layer=1)
    cache = PrefixCache(part, partial(record.of, part=0))
    with pytest.raises(NoCacheError, match="layer 2 showed no keys"):
        cache.update(torch.zeros(1), torch.zeros(1), 2)
    with pytest.raises(NoCacheError, match="another state than keys and values"):
        cache.layers[0]


def test_the_hub_client_without_private_parts(monkeypatch):
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http

    assert type(hub_client.client_factory()()) is type(get_session())
    monkeypatch.delattr(_http, "_GLOBAL_CLIENT_FACTORY")
    monkeypatch.delattr(_http, "default_client_factory")
    assert type(hub_client.client_factory()()) is type(get_session())


# Versions


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_are_exact_and_not_newer_than_what_was_tested():
    held = {name.lower().replace("-", "_"): version for name, version in constraints().items()}
    for name, tested in versions.TESTED.items():
        assert Version(held[name]) <= Version(tested)
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "@" not in text and "+cpu" not in text


def test_newer_releases_are_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(versions, "_said", False)
    monkeypatch.setitem(versions.TESTED, "peft", "0.1.0")
    echo_trainer(tmp_path / "a")
    echo_trainer(tmp_path / "b")
    said = [r.getMessage() for r in caplog.records if "Newer than what" in r.getMessage()]
    assert len(said) == 1 and "peft" in said[0] and "(tested: 0.1.0)" in said[0] and "transformers" not in said[0]


def test_env_prints_what_a_report_needs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for name in versions.TESTED:
        assert re.search(rf"^{name} +\S+ +tested with {re.escape(versions.TESTED[name])}", text, re.MULTILINE)
    assert "device" in text and "echo_trainer" in text
    assert str(Path.home()) not in text and str(tmp_path) not in text
