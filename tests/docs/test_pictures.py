"""The picture of the two passes is what its script draws, and holds nothing from elsewhere."""

import runpy
import xml.etree.ElementTree as ET

from paths import ROOT

SCRIPT = ROOT / "docs" / "images" / "make_two_passes.py"


def test_the_picture_is_what_the_script_draws():
    names = runpy.run_path(str(SCRIPT))
    drawn = names["draw"]()
    assert names["PICTURE"].read_text(encoding="utf-8") == drawn, f"run: python {SCRIPT.relative_to(ROOT)}"
    assert ET.fromstring(drawn).find("{http://www.w3.org/2000/svg}title").text
    assert "prefers-color-scheme: dark" in drawn
    assert drawn.count("http") == 1  # the name space
