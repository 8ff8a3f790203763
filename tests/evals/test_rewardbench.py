"""RewardBench's sections are weighted as it weights them."""

from evals import rewardbench


def test_rewardbench_sections(capsys):
    """The published 2,985 prompts. Right on all math, on half the code: (984 + 6 * 82) / 1968."""
    counts = {name: n for parts in rewardbench.SECTIONS.values() for name, n in parts.items()}
    counts["math-prm"] = 447
    assert sum(counts.values()) == 2985
    names = [name for name, n in counts.items() for _ in range(n)] + ["another"]
    wins = [not name.startswith("hep") or i % 2 for i, name in enumerate(names)]
    found = rewardbench.sections(names, wins)
    assert {k: round(v.mean, 9) for k, v in found.items()} == {
        "Chat": 1, "Chat Hard": 1, "Safety": 1, "Reasoning": 0.75, "score": 0.9375
    }  # fmt: skip
    assert 0.70 < found["Reasoning"].low < 0.75 < found["Reasoning"].high < 0.80
    assert "left out" not in capsys.readouterr().out
    some = [i for i, name in enumerate(names) if name != "donotanswer" and name[:4] != "hep-"]
    found = rewardbench.sections([names[i] for i in some], [wins[i] for i in some])
    assert list(found) == ["Chat", "Chat Hard"]
    missing = ["donotanswer"] + [name for name in counts if name[:4] == "hep-"]
    assert f"left out for want of {', '.join(missing)}\n" in capsys.readouterr().out
    assert rewardbench.sections(["", "another"], [1, 0]) == {}
