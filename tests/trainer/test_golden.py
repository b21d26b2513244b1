"""The numbers of four small runs stay what they were: bit for bit with the versions they were made with."""

import json

import golden
import pytest

KEPT = json.loads(golden.RESULTS.read_text())


@pytest.mark.parametrize("name", golden.RUNS)
def test_golden_run(name):
    kept, found = KEPT["runs"][name], golden.run(name)
    assert found["routes"] == kept["routes"]
    assert found["objective"] == pytest.approx(kept["objective"], rel=1e-5)
    assert found["adapter_norm"] == pytest.approx(kept["adapter_norm"], rel=1e-5)
    if golden.environment() == KEPT["environment"]:
        assert found == kept
