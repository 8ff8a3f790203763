"""Flip every sign, reference, length and context of losses.py in turn; the tests must notice each.

    python tests/tools/mutations.py        a few minutes; prints which test noticed, exits 1 if none did

A mutation is a text of losses.py and what stands in its place.
"""

# ruff: noqa: E501  (a mutation a line)

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/test_losses.py", "tests/test_theory.py", "-m", "not slow"]

MUTATIONS = [
    # the objectives; several share a line, and then are mutated together
    ("dpo: rejected log-ratio added", "- (rejected - ref_rejected))\n    return -(1", "+ (rejected - ref_rejected))\n    return -(1"),
    ("dpo: reference left out", "margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))\n    return -(1", "margin = beta * (chosen - rejected)\n    return -(1"),
    ("dpo: references exchanged", "((chosen - ref_chosen) - (rejected - ref_rejected))\n    return -(1", "((chosen - ref_rejected) - (rejected - ref_chosen))\n    return -(1"),
    ("dpo: sign of the loss", "return -(1 - label_smoothing) * logsigmoid(margin)", "return (1 - label_smoothing) * logsigmoid(margin)"),
    ("dpo: sign of the margin", "return -(1 - label_smoothing) * logsigmoid(margin)", "return -(1 - label_smoothing) * logsigmoid(-margin)"),
    ("dpo: smoothing on the wrong side", "label_smoothing * logsigmoid(-margin)", "label_smoothing * logsigmoid(margin)"),
    ("ipo: target's sign", "(gap - 1 / (2 * tau)) ** 2", "(gap + 1 / (2 * tau)) ** 2"),
    ("ipo: target tau / 2", "1 / (2 * tau)", "tau / 2"),
    ("ipo: gap's sign", "(gap - 1 / (2 * tau)) ** 2", "(-gap - 1 / (2 * tau)) ** 2"),
    ("rdpo: length rewarded", "alpha * (len_chosen - len_rejected)", "alpha * (len_rejected - len_chosen)"),
    ("rdpo: margin's sign", "-logsigmoid(margin + alpha", "-logsigmoid(-margin + alpha"),
    ("ld_dpo: weights exchanged", "where(place < shared, alpha", "where(place >= shared, alpha"),
    ("ld_dpo: one token more is shared", "where(place < shared, alpha", "where(place <= shared, alpha"),
    ("ld_dpo: reference added", "(tokens - ref_tokens)", "(tokens + ref_tokens)"),
    ("ld_dpo: answers exchanged", "(beta * (chosen - weighted(", "(-beta * (chosen - weighted("),
    ("a view for another's z", "zip(views, kl or", "zip(views[::-1], kl or"),
    ("simpo: gamma added", "(mean_chosen - mean_rejected) - gamma", "(mean_chosen - mean_rejected) + gamma"),
    ("simpo: gamma divided by beta", "- gamma)", "- gamma / beta)"),
    ("simpo: answers exchanged", "-logsigmoid(beta * (mean_chosen - mean_rejected)", "-logsigmoid(beta * (mean_rejected - mean_chosen)"),
    ("orpo: likelihood's sign", "return -mean_chosen - lam * logsigmoid", "return mean_chosen - lam * logsigmoid"),
    ("orpo: odds ratio's sign", "-mean_chosen - lam * logsigmoid", "-mean_chosen + lam * logsigmoid"),
    ("orpo: odds upside down", "return mean_logp - torch.log(-torch.expm1(mean_logp))", "return torch.log(-torch.expm1(mean_logp)) - mean_logp"),
    ("orpo: log-probabilities for odds", "return mean_logp - torch.log(-torch.expm1(mean_logp))", "return mean_logp"),
    ("cpo: answers exchanged", "-logsigmoid(beta * (chosen - rejected))", "-logsigmoid(beta * (rejected - chosen))"),
    ("cpo: likelihood's sign", "logsigmoid(beta * (chosen - rejected)) - lam", "logsigmoid(beta * (chosen - rejected)) + lam"),
    ("slic: answers exchanged", "(delta - (chosen - rejected))", "(delta + (chosen - rejected))"),
    ("slic: likelihood's sign", ".clamp(min=0) - lam * mean_chosen\n\n\ndef rrhf", ".clamp(min=0) + lam * mean_chosen\n\n\ndef rrhf"),
    ("rrhf: answers exchanged", "(mean_rejected - mean_chosen).clamp", "(mean_chosen - mean_rejected).clamp"),
    ("rrhf: likelihood's sign", ".clamp(min=0) - lam * mean_chosen\n\n\ndef kto", ".clamp(min=0) + lam * mean_chosen\n\n\ndef kto"),
    ("kto: z on the wrong side of the chosen", "(chosen - ref_chosen - kl)", "(chosen - ref_chosen + kl)"),
    ("kto: z on the wrong side of the rejected", "(kl - (rejected - ref_rejected))", "(-kl - (rejected - ref_rejected))"),
    ("kto: rejected answer's sign", "(kl - (rejected - ref_rejected))", "(kl + (rejected - ref_rejected))"),
    ("kto: weights exchanged", "lambda_w * (1 - wins) + lambda_l * (1 - losses)", "lambda_l * (1 - wins) + lambda_w * (1 - losses)"),
    ("sft: sign", "    return -chosen\n", "    return chosen\n"),
    ("sft: per pair", 'Objective(sft, per="token")', "Objective(sft)"),
    ("reward: sign", "-logsigmoid(chosen - rejected)", "-logsigmoid(rejected - chosen)"),
    # the paths
    ("cross: each answer sees itself", '"cross": (("rejected", "chosen"),)', '"cross": (("chosen", "rejected"),)'),
    ("cross: one-sided instead", '"cross": (("rejected", "chosen"),)', '"cross": (("rejected", "rejected"),)'),
    ("one_sided: the other side", '"one_sided": (("rejected", "rejected"),)', '"one_sided": (("chosen", "chosen"),)'),
    ("averaged: conditioned half alone", '"averaged": ((None, None), ("rejected", "chosen"))', '"averaged": (("rejected", "chosen"),)'),
    ("ins_: reference conditioned too", '"cross", "sep", "plain")', '"cross", "sep", "conditioned")'),
    ("ifsr_: reference on the prompt alone", '"cross", "turn", "conditioned")', '"cross", "turn", "plain")'),
    ("ins_: bridge", '"cross", "sep", "plain")', '"cross", "turn", "plain")'),
    ("irft: conditioned half alone", 'Preset("sft", "averaged", "turn")', 'Preset("sft", "cross", "turn")'),
    ("reference on the other answer", "else Path(None, path.target)", "else Path(None, path.context)"),
    ("plain reference conditioned", "return path if self.reference == \"conditioned\" else Path(None, path.target)", "return path"),
    ("conditioned reference plain", "return path if self.reference == \"conditioned\" else Path(None, path.target)", "return Path(None, path.target)"),
    # the step
    ("means are sums", "known[answer] / n,", "known[answer],"),
    ("rdpo: lengths of the log-probabilities", 'f"len_{answer}": n}', 'f"len_{answer}": known[answer]}'),
    ("lengths of one answer for both", 'f"len_{answer}": n}', 'f"len_{answer}": counts[view["chosen"]]}'),
    ("views added, not averaged", "PairLosses(losses / len(views)", "PairLosses(losses"),
    ("irft: tokens of one view", "counts[path] for view in self.views for", "counts[path] for view in self.views[:1] for"),
    ("implicit reward without the reference", 'value = known[answer] - known[f"ref_{answer}"]', "value = known[answer]"),
    ("implicit reward unscaled", "return self.scale * value.detach()", "return value.detach()"),
]  # fmt: skip


def first_failure(project):
    """Name of the first test that fails in this copy of the project, or None."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S+?(?:::(\S+))?(?: - .*)?$", done.stdout, re.M)
    return found.group(1) or "the collection" if found else done.stdout[-300:]


def main():
    survived = 0
    with tempfile.TemporaryDirectory() as work:
        project = Path(work) / "project"
        ignored = shutil.ignore_patterns(".*", "runs", "assets", "docs", "__pycache__")
        shutil.copytree(ROOT, project, ignore=ignored)
        (project / "assets").symlink_to(ROOT / "assets")
        source = (ROOT / "losses.py").read_text(encoding="utf-8")
        assert (failed := first_failure(project)) is None, f"the tests fail as they are: {failed}"
        for name, old, new in MUTATIONS:
            assert source.count(old) >= 1, f"{name}: losses.py has changed; mend this list"
            (project / "losses.py").write_text(source.replace(old, new), encoding="utf-8")
            noticed = first_failure(project)
            survived += noticed is None
            print(f"{name:45} {noticed or 'SURVIVED'}", flush=True)
    print(f"{len(MUTATIONS) - survived} of {len(MUTATIONS)} noticed")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
