"""Recipes of any content are read or refused in plain words; nothing is written, nothing else is raised."""

import os
import string

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echo_trainer.recipe.arguments import CLASSES, parse
from echo_trainer.recipe.read import read_recipe

FIELDS = sorted({name for cls in CLASSES for name in cls.__dataclass_fields__} - {"output_dir"})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(string.printable, max_size=12)
    | st.dates()
    | st.sampled_from(["auto", "no", "steps", "1e-4", "../../x", "/", "{}", "[1", "cka", "-1", "nan"])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
ANY = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@settings(ANY, max_examples=300)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes(folder, content):
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_recipe(path), dict)
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 1000  # noqa: PT017


@settings(ANY, max_examples=60)
@given(options=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), VALUES, max_size=4))
def test_any_options(folder, options):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "out", "use_cpu": True, **options}))
    before, here = sorted(os.listdir(folder)), os.getcwd()
    os.chdir(folder)
    try:
        _, config, _, _ = parse(["--config", str(path)])
        assert config.output_dir == "out"
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        assert str(error)  # noqa: PT017
    except SystemExit as stop:  # argparse has said which option it is
        assert stop.code == 2  # noqa: PT017
    finally:
        os.chdir(here)
    assert sorted(os.listdir(folder)) == before
