"""Every code block of the README and the documentation runs as it is printed, or says why not."""

import pytest
from doc_blocks import PAGES, Block, Page, blocks_of, furnish
from paths import ROOT

pytestmark = pytest.mark.slow

# The first words of what keeps a block from running in a test.
REASONS = ("needs", "installs", "starts", "pushes", "takes", "DPO")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_blocks_run(page, tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    shared = Page(page)
    for block in blocks_of(page):
        if block.reason is None:
            shared.run(block)
        else:
            assert block.reason.split()[0] in REASONS, f"{page}:{block.line} is not run since it {block.reason}"


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_overlooked(page):
    fences = sum(line.startswith("```") for line in (ROOT / page).read_text(encoding="utf-8").splitlines())
    assert fences == 2 * len(blocks_of(page))


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (Block("python", None, "1 / 0\n", 7, None), ZeroDivisionError),
        (Block("bash", None, "make me a sandwich\n", 7, None), AssertionError),
        (Block("bash", None, "echo-trainer trian\n", 7, None), AssertionError),
        (Block("yaml", None, "learning_rat: 1.0\n", 7, None), ValueError),
        (Block("json", None, "{]\n", 7, None), ValueError),
        (Block("", None, "what?\n", 7, None), AssertionError),
    ],
    ids=lambda value: value.code.strip() if isinstance(value, Block) else "",
)
def test_a_wrong_block_is_noticed_with_its_line(block, error):
    with pytest.raises(error) as raised:
        Page("docs/page.md").run(block)
    assert any("docs/page.md:7" in note for note in raised.value.__notes__)
