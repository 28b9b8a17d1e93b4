import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_quantizers_is_up_to_date():
    spec = importlib.util.spec_from_file_location("table", ROOT / "scripts" / "quantizer_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.render()
    names = [path.stem for path in (ROOT / "configs" / "quantizer").glob("*.yaml")]
    assert all(f"| `{name}` |" in page for name in names) and names
    assert page == script.PAGE.read_text(), "run python scripts/quantizer_table.py"
