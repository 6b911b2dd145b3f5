from core.errors import hint, nearest


def test_nearest_finds_a_misspelling_and_refuses_a_stranger() -> None:
    assert nearest("rmsnrom", ["layernorm", "rmsnorm"]) == "rmsnorm"
    assert nearest("zzz", ["layernorm", "rmsnorm"]) is None


def test_hint_lists_what_is_valid_when_nothing_is_near() -> None:
    assert hint("rmsnrom", ["layernorm", "rmsnorm"]) == "; did you mean 'rmsnorm'?"
    assert hint("zzz", ["b", "a"]) == "; valid: a, b"
    assert hint("zzz", []) == ""


def test_hint_cuts_a_long_list() -> None:
    text = hint("?", [f"option{i:02}" for i in range(30)])
    assert "option19" in text and "option20" not in text and text.endswith("…")
