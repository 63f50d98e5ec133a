"""The code blocks of docs/integrations.md, each section's run by the tests of its client."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"


def run_section(heading: str, **names: Any) -> dict[str, Any]:
    """Run the blocks under a heading, one after the other, with what the text says is there already."""
    parts = dict(zip(*[iter(re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.M)[1:])] * 2, strict=True))
    blocks = re.findall(r"^```python clients\n(.*?)^```", parts[heading], re.S | re.M)
    assert blocks, f"{heading} has no code"
    for block in blocks:
        exec(compile(block, f"{PAGE}: {heading}", "exec"), names)
    return names
