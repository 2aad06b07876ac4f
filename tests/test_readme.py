import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples(capsys):
    """The README's Python runs, as one program, and prints what its comments say."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) > 2
    program = "\n".join(blocks)
    exec(compile(program, README.name, "exec"), {})
    said = re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
    out = capsys.readouterr().out
    assert said and all(line in out for line in said)
