"""A small world whose preferences are known exactly: the embedded default's data and its judge.

There are Q = 20 questions. An answer is made of four independent binary choices, so every question
has A = 16 answers, all different texts:

    choice      1 (scores)               0 (scores nothing)       score
    greeting    "Hello!"                 "Hm."                      1.0
    fact        the right answer         a wrong answer             2.0
    reason      one more sentence        nothing                    1.5
    closing     "Cheers!"                "Bye."                     1.0

The utility of an answer is the sum of its scores, u(y) = sum_i score_i choice_i(y), and a judge who
sees two answers y, y' to x prefers y with the Bradley-Terry probability

    separable       P(y > y' | x) = sigmoid(u(y) - u(y'))

That is what DPO and its kin assume: one number per answer explains every comparison. The second
kind adds a taste for style that runs in a circle, like rock, paper, scissors. The four styles
s = (greeting, closing) stand in the order 00, 01, 11, 10, and each beats the one before it, the
first beats the last, and styles two apart are equals:

    intransitive    P(y > y' | x) = sigmoid(u(y) - u(y') + TASTE * sin(pi/2 (s(y) - s(y'))))

A third kind serves to choose learning rates without looking at the other two: in the mirrored
world every taste is reversed,

    mirrored        P(y > y' | x) = sigmoid(u(y') - u(y))

A fourth kind makes an answer tell who judges. Half of the judges love what the others hate; those
who open with "Hello!" judge pairs of answers that both do, the others pairs of "Hm.", and a pair of
both kinds is judged by either, so no one is ahead. With v the utility without the greeting's score:

    two judges      P(y > y' | x) = sigmoid(v(y) - v(y'))  both open with "Hello!"
                                    sigmoid(v(y') - v(y))  both open with "Hm."
                                    1/2                    otherwise

The sine is antisymmetric, so P(y > y') + P(y' > y) = 1 holds for every kind. Around the circle the
separable logits add up to 0 and the intransitive ones to 4 TASTE, so no scalar utility, and hence
no Bradley-Terry reward, represents the second kind (the general preference of InSPO section 3).

Win rates need no judge and no sampling. For a policy p and an opponent o, both (Q, A) arrays of
probabilities of the 16 answers, which may sum to less than one since a language model can say
anything, write p_out = 1 - sum_a p_a for what lies outside. Text outside the 16 answers loses
against any of them and ties with other such text, therefore

    win(p, o) = mean over x of  sum_ab p_a o_b P(a > b | x) + (1 - p_out) o_out + p_out o_out / 2

is exact: every term is a finite sum of known numbers. win(p, p) = 1/2 for every p.

    python assets/world.py        prints some of it; assets/build.py writes it to files
"""

import numpy as np

GREETINGS = ("Hm.", "Hello!")
CLOSINGS = ("Bye.", "Cheers!")

# question | right answer | wrong answer | reason
FACTS = """
What colour is a clear sky? | Blue. | Green. | Air scatters short waves.
How many legs does a spider have? | Eight. | Six. | It is not an insect.
What do bees make? | Honey. | Butter. | It feeds them in winter.
Where does the sun rise? | In the east. | In the north. | The earth spins that way.
What is frozen water called? | Ice. | Steam. | It hardly moves.
Which planet is the hottest? | Venus. | Neptune. | Its air traps heat.
How many days are in a week? | Seven. | Nine. | People agreed on it.
What is the capital of France? | Paris. | Rome. | Its rulers sit there.
What do cows eat? | Grass. | Fish. | Their stomachs suit it.
Which animal barks? | The dog. | The cat. | Barking warns the pack.
How many sides does a triangle have? | Three. | Five. | Its name says so.
What is the opposite of hot? | Cold. | Loud. | It means lack of heat.
Which metal does a magnet attract? | Iron. | Gold. | Its electrons line up.
Which season follows winter? | Spring. | Autumn. | The days grow longer.
How much is two plus two? | Four. | Nine. | Count it on your fingers.
What gas do plants take in? | Carbon dioxide. | Helium. | It becomes sugar.
Who wrote Hamlet? | Shakespeare. | Mozart. | He wrote for the stage.
Which ocean is the largest? | The Pacific. | The Arctic. | No other is as wide.
What do we hear with? | Our ears. | Our knees. | Sound shakes the air.
When do owls hunt? | At night. | At noon. | They need little light.
"""
FACTS = tuple(tuple(line.split(" | ")) for line in FACTS.strip().splitlines())

# The 16 answers are the 16 rows, in the columns' order: greeting, fact, reason, closing.
CHOICES = np.array([[a >> 3 & 1, a >> 2 & 1, a >> 1 & 1, a & 1] for a in range(16)])  # (A, 4)
SCORES = np.array([1.0, 2.0, 1.5, 1.0])
TASTE = 3.0
KINDS = ("separable", "intransitive")  # what is reported
MIRRORED = "mirrored"  # where learning rates are chosen
TWO_JUDGES = "two judges"


def questions():
    """The 20 question texts, in a fixed order."""
    return [fact[0] for fact in FACTS]


def answers(question):
    """The 16 answer texts of a question, in the order of CHOICES; KeyError if it is not ours."""
    right, wrong, reason = {fact[0]: fact[1:] for fact in FACTS}[question]
    texts = []
    for greeting, fact, reasoned, closing in CHOICES:
        parts = [GREETINGS[greeting], right if fact else wrong]
        parts += [reason] if reasoned else []
        texts.append(" ".join([*parts, CLOSINGS[closing]]))
    return texts


def utility():
    """(A,) the utility of each answer; the same for every question."""
    return CHOICES @ SCORES


def style():
    """(A,) each answer's place on the circle of styles (greeting, closing): 00, 01, 11, 10."""
    greeting, closing = CHOICES[:, 0], CHOICES[:, 3]
    return np.where(greeting == 1, 3 - closing, closing)


def preference_logits(kind="separable"):
    """(A, A) antisymmetric: the log-odds that the row's answer is preferred to the column's."""
    kinds = (*KINDS, MIRRORED, TWO_JUDGES)
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, not {kind!r}")
    if kind == TWO_JUDGES:
        judge, without = 2 * CHOICES[:, 0] - 1, CHOICES[:, 1:] @ SCORES[1:]
        return np.add.outer(judge, judge) / 2 * np.subtract.outer(without, without)
    logits = np.subtract.outer(utility(), utility())  # (A, A)
    if kind == MIRRORED:
        return -logits
    if kind == "intransitive":
        # sin(pi/2 d) for whole d, without its rounding: 0, 1, 0, -1
        turn = np.array([0.0, 1.0, 0.0, -1.0])
        logits = logits + TASTE * turn[np.subtract.outer(style(), style()) % 4]
    return logits


def preference_matrix(question, kind="separable"):
    """(A, A): entry [a, b] is P(answer a is preferred to answer b | question).

    In this world it is the same for every question, and a question that is not ours is a KeyError.
    """
    answers(question)
    return 1.0 / (1.0 + np.exp(-preference_logits(kind)))


def sample_pairs(n, seed, kind="separable"):
    """Yield n rows {"prompt", "chosen", "rejected"}, the same ones for the same arguments.

    The question and an ordered pair of two different answers are uniform; which of them becomes
    "chosen" is one draw from P, so a worse answer wins as often as the formula says.
    """
    rng = np.random.default_rng(seed)
    prompts = questions()
    for _ in range(n):
        prompt = prompts[rng.integers(len(prompts))]
        first, second = rng.choice(len(CHOICES), size=2, replace=False)
        if rng.random() >= preference_matrix(prompt, kind)[first, second]:
            first, second = second, first
        texts = answers(prompt)
        yield {"prompt": prompt, "chosen": texts[first], "rejected": texts[second]}


def uniform_pairs(seed):
    """Every ordered pair of different answers to every question once (4,800 rows), shuffled.

    Nothing is preferred: either column is exactly uniform over the 16 answers, and given the other
    exactly uniform over the 15 that differ from it.
    """
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt in questions()
        for chosen in answers(prompt)
        for rejected in answers(prompt)
        if chosen != rejected
    ]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def uniform_attempts(n, seed, instructions):
    """n rows of uniform_pairs, of which half ask for a further attempt. Nothing is preferred.

    Of the asking rows four in five do so in a dialogue (question, a third answer, instruction),
    one in five right behind the question. instructions: texts, each equally often.
    """
    rng = np.random.default_rng(seed)
    for row in uniform_pairs(seed)[:n]:
        question, asks = row["prompt"], instructions[rng.integers(len(instructions))]
        others = [text for text in answers(question) if text != row["chosen"]]
        turns = [("user", question), ("assistant", others[rng.integers(15)]), ("user", asks)]
        kind = rng.choice(3, p=[0.5, 0.4, 0.1])
        dialogue = [{"role": role, "content": content} for role, content in turns]
        yield row | {"prompt": (question, dialogue, f"{question}\n{asks}")[kind]}


def answer_probabilities(logps):
    """(Q, A) summed log-probabilities, end token included, to (Q, A) probabilities.

    Nothing is renormalised: what is missing to one is the mass on other texts. ValueError if a
    question's answers hold more than one, which means that the log-probabilities are wrong.
    """
    probabilities = np.exp(np.asarray(logps, dtype=np.float64))
    if (probabilities.sum(-1) > 1 + 1e-3).any():
        raise ValueError("the answers of one question have a total probability above 1")
    return probabilities


def expected_win_rate(policy, opponent, kind="separable"):
    """Exact probability in [0, 1] that the policy's answer is preferred to the opponent's.

    policy and opponent are (Q, A) probabilities with rows summing to at most one. A policy that is
    shown the opponent's answer b before it speaks is (Q, A, A), indexed [question, b, a]; shown
    text outside the 16 answers it is taken to beat it whenever it gives any of them, or to tie,
    in proportions averaged over b. The formula is the one at the head of this file.
    """
    policy, opponent = np.asarray(policy, np.float64), np.asarray(opponent, np.float64)
    matrix = np.stack([preference_matrix(question, kind) for question in questions()])  # (Q, A, A)
    if policy.ndim == 2:
        policy = np.broadcast_to(policy[:, None], matrix.shape)  # (Q, B, A): blind to b
    inside = np.einsum("qba,qb,qab->q", policy, opponent, matrix)  # both are answers
    valid = policy.sum(-1).mean(-1)  # (Q,)
    outside = 1.0 - opponent.sum(-1)  # (Q,) the opponent's mass on other texts
    return float((inside + outside * (valid + (1.0 - valid) / 2)).mean())


def best_win_rate(opponent, kind="separable", shown=False):
    """The largest expected_win_rate that any policy reaches against opponent (Q, A).

    With shown=True the policy sees the opponent's answer first (InSPO Theorem 3.2's advantage):
    equal under the separable kind when one answer is best against all, larger otherwise.
    """
    matrix = np.stack([preference_matrix(question, kind) for question in questions()])  # (Q, A, B)
    opponent = np.asarray(opponent, np.float64)
    if shown:
        inside = (matrix.max(1) * opponent).sum(-1)  # the best reply to each b
    else:
        inside = np.einsum("qab,qb->qa", matrix, opponent).max(-1)  # the best fixed answer
    return float((inside + 1.0 - opponent.sum(-1)).mean())


def main():
    """Print one question's answers, some pairs, and what can be won."""
    prompt, uniform = questions()[0], np.full((len(FACTS), len(CHOICES)), 1 / len(CHOICES))
    print(f"{prompt}    (one of {len(FACTS)} questions)")
    for text, u in zip(answers(prompt), utility(), strict=True):
        print(f"  u = {u:.1f}  {text}")
    for row in sample_pairs(3, seed=0):
        print(
            f"\nprompt    {row['prompt']}\nchosen    {row['chosen']}\nrejected  {row['rejected']}"
        )
    print("\nbest win rates against uniformly random answers, in percent")
    for kind in KINDS:
        blind, shown = (100 * best_win_rate(uniform, kind, shown=s) for s in (False, True))
        print(f"  {kind:13} {blind:.1f}, or {shown:.1f} when shown the opponent's answer first")


if __name__ == "__main__":
    main()
