"""Rows of published datasets in their exact schemas, and the pairs that they must give.

`PUBLISHED` has a few rows per dataset with all columns that the hub's files have, under the names
of the published files; texts are our own, expected pairs are written by hand.
"""

import json

from dialogues import reply, say


def h4(prompt, chosen, rejected, scores):
    """HuggingFaceH4/ultrafeedback_binarized"""
    return {
        "prompt": prompt,
        "prompt_id": "9b0f",
        "chosen": say(prompt, chosen),
        "rejected": say(prompt, rejected),
        "messages": say(prompt, chosen),
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


def princeton(prompt, answers, scores):
    """princeton-nlp/llama3-ultrafeedback-armorm: the best and the worst of five generations"""
    best, worst = (pick(range(len(scores)), key=scores.__getitem__) for pick in (max, min))
    return {
        "prompt_id": "9b0f",
        "prompt": prompt,
        "all_generated_responses": answers,
        "all_rm_scores": scores,
        "chosen": say(prompt, answers[best]),
        "rejected": say(prompt, answers[worst]),
    }


def completion(response, overall, ratings="5555"):
    """One of openbmb/UltraFeedback's four completions."""
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    notes = {a: {"Rating": r, "Rationale": "Fine."} for a, r in zip(aspects, ratings, strict=True)}
    return {
        "annotations": notes,
        "custom_system_prompt": "You help.",
        "model": "alpaca-7b",
        "principle": "helpfulness",
        "response": response,
        "critique": "Fine.",
        "overall_score": overall,
        "fine-grained_score": 4.0,
    }


def openbmb(instruction, *completions):
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": ["alpaca-7b", "gpt-4", "llama-2-7b-chat", "bard"],
        "completions": list(completions),
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def shp(history, a, b, labels, ratio):
    """stanfordnlp/SHP"""
    return {
        "post_id": "qt3nxl",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": history,
        "c_root_id_A": "hkh1",
        "c_root_id_B": "hkh2",
        "created_at_utc_A": 1636822112,
        "created_at_utc_B": 1636822110,
        "score_A": 340,
        "score_B": 166,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": labels,
        "seconds_difference": 2.0,
        "score_ratio": ratio,
    }


def oasst(id, parent, role, text, rank=None, lang="en"):
    """OpenAssistant/oasst1, the flat table"""
    return {
        "message_id": id,
        "parent_id": parent,
        "user_id": "u1",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": role,
        "lang": lang,
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.0004, "insult": 0.0001},
        "message_tree_id": "m1",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    }


def argilla(instruction, chosen, rejected, ratings):
    """argilla/ultrafeedback-binarized-preferences"""
    return {
        "source": "flan_v2_niv2",
        "instruction": instruction,
        "chosen_response": chosen,
        "rejected_response": rejected,
        "chosen_avg_rating": ratings[0],
        "rejected_avg_rating": ratings[1],
        "chosen_model": "gpt-4",
    }


def cleaned(prompt, chosen, rejected, ratings):
    """argilla/ultrafeedback-binarized-preferences-cleaned"""
    return {
        "source": "sharegpt",
        "prompt": prompt,
        "chosen": say(prompt, chosen),
        "chosen-rating": ratings[0],
        "chosen-model": "gpt-4",
        "rejected": say(prompt, rejected),
        "rejected-rating": ratings[1],
        "rejected-model": "alpaca-7b",
    }


HH = "\n\nHuman: Can cats swim?\n\nAssistant: Some do.\n\nHuman: Which?\n\nAssistant: "
MORE = say("Can cats swim?", "Some do.", "Which?")
TREE = [
    oasst("m1", None, "prompter", "Can cats swim?"),
    oasst("m2", "m1", "assistant", "Some do.", 0),
    oasst("m3", "m1", "assistant", "No idea.", 2),
    oasst("m4", "m1", "assistant", "Yes.", 1),
    oasst("m5", "m2", "prompter", "Which?", 0),
    oasst("m6", "m2", "prompter", "Why?", 1),
    oasst("m7", "m5", "assistant", "Van cats.", 1),
    oasst("m8", "m5", "assistant", "Turkish Vans and some Maine Coons.", 0),
    oasst("m9", "m5", "assistant", "Gatos de Van.", 2, "es"),
    oasst("m10", "gone", "assistant", "Lost.", 0),
    oasst("m11", "gone", "assistant", "Lost too.", 1),
    oasst("m12", "m6", "assistant", "Alone.", 3),
    oasst("m13", "m6", "assistant", "Unranked."),
]

SHAREGPT = ("human", "gpt") * 2
ARENA = ("model_a", "model_b", "tie", "tie (bothbad)", "both_bad")


def pku(prompt, first, second, better):
    """PKU-Alignment/PKU-SafeRLHF"""
    row = {"prompt": prompt, "prompt_source": "BeaverTails"}
    for i, text in enumerate((first, second)):
        row |= {f"response_{i}": text, f"response_{i}_source": "Alpaca-7B"}
        row |= {f"is_response_{i}_safe": True, f"response_{i}_harm_category": {"Privacy": False}}
        row |= {f"response_{i}_severity_level": 0, f"response_{i}_sha256": "ab"}
    return row | {"better_response_id": better, "safer_response_id": 0}


def helpsteer2(strength):
    """nvidia/HelpSteer2, the preference folder"""
    return {
        "split": "train",
        "prompt": "Why?",
        "response_1": "Fish.",
        "response_2": "Cats.",
        "preference_strength": strength,
        "preference_statement": "Response 1 is better.",
        "preference_elaboration": "It names the thing.",
        "three_most_similar_preferences": [{"statement": "Response 1 is better.", "strength": -1}],
        "all_preferences_unprocessed": [{"statement": "Response 1 is better.", "strength": -1}],
    }


def webgpt(first, second, *scores):
    """openai/webgpt_comparisons"""
    row = {"question": {"dataset": "eli5", "id": "1a", "full_text": "Why?"}}
    for i, text in enumerate((first, second)):
        row |= {f"quotes_{i}": {"title": ["A page"], "extract": ["Cats eat fish."]}}
        row |= {f"answer_{i}": text, f"tokens_{i}": {"prefix": [1], "completion": [2]}}
        row |= {f"score_{i}": scores[i]}
    return row


def arena(winner, first, second):
    """lmsys/chatbot_arena_conversations"""
    return {
        "question_id": "58",
        "model_a": "chatglm-6b",
        "model_b": "koala-13b",
        "winner": winner,
        "judge": "arena_user_973",
        "conversation_a": first,
        "conversation_b": second,
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1,
        "openai_moderation": {"categories": {"hate": False}},
        "toxic_chat_tag": {"roberta-large": {"flagged": False}},
    }


def arena_55k(a, b, tie):
    """lmsys/lmsys-arena-human-preference-55k; where b wins, it was asked less"""
    return {
        "id": 30192,
        "model_a": "gpt-4",
        "model_b": "koala-13b",
        "prompt": json.dumps(["Can cats swim?", "Which?"]),
        "response_a": json.dumps(["Some do.", "Vans."]),
        "response_b": json.dumps(["Some do.", "Dogs."][b:]),
        "winner_model_a": a,
        "winner_model_b": b,
        "winner_tie": tie,
    }


def in_parts(messages):
    """lmarena-ai/arena-human-preference-140k: the content is a list of parts."""
    empty = {"image": None, "mimeType": None}
    return [
        {
            "role": m["role"],
            "content": [{"type": "text", "text": m["content"]} | empty],
            "num_tokens": 1,
        }
        for m in messages
    ]


# dataset -> (file as published, rows, [(prompt, chosen, rejected, margin)], drops by rule)
PUBLISHED = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        "train_prefs-00000-of-00001.parquet",
        [
            h4("Can cats swim?", "Some do.", "No.", (8.0, 5.5)),
            h4("Why?", "For fish.", "Cats.", (7.0, 7.0)),
        ],
        [
            (say("Can cats swim?"), "Some do.", "No.", 2.5),
            (say("Why?"), "For fish.", "Cats.", 0.0),
        ],
        {},
    ),
    "princeton-nlp/llama3-ultrafeedback-armorm": (
        "train-00000-of-00002.parquet",
        [
            princeton(
                "Why?", ["Fish.", "Cats.", "Well …", "Hm.", "So."], [0.15, 0.05, 0.1, 0.1, 0.1]
            )
        ],
        [(say("Why?"), "Fish.", "Cats.", 0.1)],
        {},
    ),
    "openbmb/UltraFeedback": (
        "evol_instruct.jsonl",
        [
            openbmb("Why?", completion("Cats.", 3.0), completion("Fish.", 8.5)),
            openbmb(
                "Hm?",
                completion("a", None, "1234"),
                completion("b", "N/A", "5N55"),
            ),
            openbmb("Tie?", completion("a", 4), completion("b", 4)),
            openbmb("Unrated?", completion("a", "N/A", "NNNN"), completion("b", 4)),
            openbmb("None?"),
        ],
        [(say("Why?"), "Fish.", "Cats.", 5.5), (say("Hm?"), "b", "a", 2.5)],
        {"no lower-rated completion": 3},
    ),
    "trl-lib/ultrafeedback_binarized": (
        "train-00000-of-00001.parquet",
        [
            {
                "chosen": say("Why?", "Fish."),
                "rejected": say("Why?", "Cats."),
                "score_chosen": 9.0,
                "score_rejected": 4.0,
            }
        ],
        [(say("Why?"), "Fish.", "Cats.", 5.0)],
        {},
    ),
    "Anthropic/hh-rlhf": (
        "train.jsonl.gz",
        [
            {"chosen": HH + "Turkish Vans.", "rejected": HH + "Dogs."},
            {"chosen": HH + "Vans.", "rejected": HH.replace("Which", "Why") + "Fish."},
            {"chosen": HH.rstrip(), "rejected": HH + "Dogs."},
        ],
        [(MORE, "Turkish Vans.", "Dogs.", None)],
        {"prompts differ": 1, "empty answer": 1},
    ),
    "stanfordnlp/SHP": (
        "train.json",
        [
            shp("How long to boil eggs?", "Six minutes.", "Ages.", 1, 2.048),
            shp("How long to boil eggs?", "Eggs?", "Ten minutes.", 0, 5.0),
            shp("Salt in the water?", "A pinch.", "Never.", 1, 1.999),
        ],
        [
            (say("How long to boil eggs?"), "Six minutes.", "Ages.", None),
            (say("How long to boil eggs?"), "Ten minutes.", "Eggs?", None),
        ],
        {"score ratio under 2": 1},
    ),
    "OpenAssistant/oasst1": (
        "train-00000-of-00001-b42a775f407cee45.parquet",
        TREE,
        [
            (say("Can cats swim?"), "Yes.", "No idea.", None),
            (say("Can cats swim?"), "Some do.", "Yes.", None),
            (MORE, "Turkish Vans and some Maine Coons.", "Van cats.", None),
        ],
        {
            "a user's message": 3,
            "best of its siblings": 3,
            "not English": 1,
            "its parent is missing": 1,
            "no sibling a rank above": 1,
            "no rank": 1,
        },
    ),
    "argilla/ultrafeedback-binarized-preferences": (
        "train-00000-of-00001.parquet",
        [argilla("Why?", "Fish.", "Cats.", (4.75, 3.5))],
        [(say("Why?"), "Fish.", "Cats.", 1.25)],
        {},
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        "train-00000-of-00001.parquet",
        [cleaned("Why?", "Fish.", "Cats.", (5.0, 3.5))],
        [(say("Why?"), "Fish.", "Cats.", 1.5)],
        {},
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        "train-00000-of-00001.parquet",
        [{"system": "Be brief.", "input": "Why?", "chosen": "Fish.", "rejected": "Cats."}],
        [(say("Why?", system="Be brief."), "Fish.", "Cats.", None)],
        {},
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        "train-00000-of-00001.parquet",
        [
            {
                "source": "Dove",
                "prompt": "Which?",
                "chosen": [*MORE, *reply("Vans.")],
                "rejected": [*MORE, *reply("Dogs.")],
                "rating_chosen": 5,
                "rating_rejected": 4,
            }
        ],
        [(MORE, "Vans.", "Dogs.", 1.0)],
        {},
    ),
    "openbmb/UltraInteract_pair": (
        "0000_sft.parquet",
        [
            {
                "task": "Math_CoT",
                "dataset": "gsm8k",
                "trajectory": [{"from": "user", "value": "Why?"}],
                "chosen": "Step 1: Fish.",
                "rejected": "Step 1: Cats.",
                "id": "1",
                "parent_id": "0",
            }
        ],
        [(say("Why?"), "Step 1: Fish.", "Step 1: Cats.", None)],
        {},
    ),
    "llamafactory/DPO-En-Zh-20k": (
        "dpo_en.json",
        [
            {
                "conversations": [{"from": "system", "value": "Be brief."}]
                + [
                    {"from": who, "value": m["content"]}
                    for who, m in zip(SHAREGPT, MORE, strict=False)
                ],
                "chosen": {"from": "gpt", "value": "Vans."},
                "rejected": {"from": "gpt", "value": "Dogs."},
            }
        ],
        [([{"role": "system", "content": "Be brief."}, *MORE], "Vans.", "Dogs.", None)],
        {},
    ),
    "LLaMA-Factory's alpaca layout": (
        "dpo.json",
        [
            {
                "instruction": "Which?",
                "input": "Of the brown ones.",
                "chosen": "Vans.",
                "rejected": "Dogs.",
                "system": "Be brief.",
                "history": [["Can cats swim?", "Some do."]],
            }
        ],
        [
            (
                [*say("Can cats swim?", "Some do.", system="Be brief.")]
                + say("Which?\nOf the brown ones."),
                "Vans.",
                "Dogs.",
                None,
            )
        ],
        {},
    ),
    "ms-swift": (
        "rlhf.jsonl",
        [
            {"messages": [*MORE, *reply("Vans.")], "rejected_response": "Dogs."},
            {"query": "Why?", "response": "Fish.", "rejected_response": "Cats.", "history": []},
            {"messages": say("Why?", "Fish."), "rejected_messages": say("Why?", "Cats.")},
        ],
        [(MORE, "Vans.", "Dogs.", None)] + [(say("Why?"), "Fish.", "Cats.", None)] * 2,
        {},
    ),
    "OpenAI's fine-tuning": (
        "preference.jsonl",
        [
            {
                "input": {"messages": MORE, "tools": [], "parallel_tool_calls": True},
                "preferred_output": reply("Vans."),
                "non_preferred_output": reply("Dogs."),
            }
        ],
        [(MORE, "Vans.", "Dogs.", None)],
        {},
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        "train.jsonl",
        [
            pku("Why?", "Cats.", "Fish.", 1),
            pku("Which?", "Vans.", "Dogs.", 0),
        ],
        [(say("Why?"), "Fish.", "Cats.", None), (say("Which?"), "Vans.", "Dogs.", None)],
        {},
    ),
    "nvidia/HelpSteer2 (preference)": (
        "preference.jsonl.gz",
        [helpsteer2(-2), helpsteer2(1), helpsteer2(0), helpsteer2(None)],
        [(say("Why?"), "Fish.", "Cats.", 2.0), (say("Why?"), "Cats.", "Fish.", 1.0)],
        {"tie": 1, "no preference": 1},
    ),
    "nvidia/HelpSteer3 (preference)": (
        "train.jsonl.gz",
        [
            {
                "domain": "general",
                "language": "english",
                "context": MORE,
                "response1": "Vans.",
                "response2": "Dogs.",
                "overall_preference": -3,
                "individual_preference": [
                    {
                        "score": -3,
                        "reasoning": "It is so.",
                        "feedback1": "Good one.",
                        "feedback2": "",
                    }
                ],
            }
        ],
        [(MORE, "Vans.", "Dogs.", 3.0)],
        {},
    ),
    "openai/webgpt_comparisons": (
        "comparisons.jsonl",
        [
            webgpt("Fish.", "Cats.", 0.5, -0.5),
            webgpt("Cats.", "Fish.", -1, 1),
            webgpt("A", "B", 0, 0),
        ],
        [(say("Why?"), "Fish.", "Cats.", 1.0), (say("Why?"), "Fish.", "Cats.", 2.0)],
        {"tie": 1},
    ),
    "lmsys/chatbot_arena_conversations": (
        "train-00000-of-00001.parquet",
        [arena(w, say("Why?", "Fish."), say("Why?", "Cats.")) for w in ARENA],
        [(say("Why?"), "Fish.", "Cats.", None), (say("Why?"), "Cats.", "Fish.", None)],
        {"tie": 3},
    ),
    "lmsys/lmsys-arena-human-preference-55k": (
        "train.csv",
        [arena_55k(1, 0, 0), arena_55k(0, 1, 0), arena_55k(0, 0, 1)]
        + [
            arena_55k(1, 0, 0)
            | {"prompt": '["Why?"]', "response_a": "[null]"}
            | {"response_b": '["Fish."]'}
        ],
        [(MORE, "Vans.", "Dogs.", None)],
        {"tie": 1, "prompts differ": 1, "empty answer": 1},
    ),
    "lmarena-ai/arena-human-preference-140k": (
        "train-00000-of-00007.parquet",
        [
            arena("model_b", *(in_parts(say("Why?", a)) for a in ("Fish.", "Cats.")))
            | {"full_conversation": [{"user": in_parts(say("Why?"))[0]}], "evaluation_order": 1}
        ],
        [(say("Why?"), "Cats.", "Fish.", None)],
        {},
    ),
    "berkeley-nest/Nectar": (
        "rlaif.parquet",
        [
            {
                "prompt": HH,
                "answers": [
                    {"answer": "Dogs.", "model": "a", "rank": 2.0},
                    {"answer": "Vans.", "model": "b", "rank": 1.0},
                ],
                "turns": 2,
                "num_responses": 2,
                "source": ["sharegpt"],
                "good_natured": True,
            }
        ],
        [(MORE, "Vans.", "Dogs.", None)],
        {},
    ),
    "HuggingFaceH4/stack-exchange-preferences": (
        "data-00000-of-00001.parquet",
        [
            {
                "qid": 7,
                "question": "<p>Why?</p>",
                "answers": [
                    {
                        "answer_id": 1,
                        "author": "A B",
                        "pm_score": 1,
                        "selected": False,
                        "text": "C.",
                    },
                    {
                        "answer_id": 2,
                        "author": "C D",
                        "pm_score": 4,
                        "selected": True,
                        "text": "F.",
                    },
                ],
                "date": "2014/03/12",
                "metadata": ["https://example.com/questions/7"],
            }
        ],
        [(say("<p>Why?</p>"), "F.", "C.", 3.0)],
        {},
    ),
    "lvwerra/stack-exchange-paired": (
        "train-00000-of-00020.parquet",
        [
            {
                "qid": 7,
                "question": "Why?",
                "date": "2014/03/12",
                "metadata": ["https://example.com/questions/7"],
                "response_j": "Fish.",
                "response_k": "Cats.",
            }
        ],
        [(say("Why?"), "Fish.", "Cats.", None)],
        {},
    ),
    "allenai/reward-bench-2": (
        "test-00000-of-00001.parquet",
        [
            {
                "id": "1",
                "prompt": "Why?",
                "chosen": ["Fish."],
                "rejected": ["Cats."],
                "num_correct": 1,
                "num_incorrect": 1,
                "total_completions": 2,
                "models": ["a", "b"],
                "subset": "Focus",
                "additional_metadata": {"category": "A category", "prompt_norm": None},
            }
        ],
        [(say("Why?"), "Fish.", "Cats.", None)],
        {},
    ),
    "llm-blender/Unified-Feedback": (
        "val-00000-of-00001.parquet",
        [
            {
                "id": "alpaca_0",
                "conv_A": say("Why?", "Cats."),
                "conv_A_rating": 0.0,
                "conv_B": say("Why?", "Fish."),
                "conv_B_rating": 1.0,
                "num_turns": 1,
                "source": "a/b",
            }
        ],
        [(say("Why?"), "Fish.", "Cats.", 1.0)],
        {},
    ),
    "allenai/reward-bench": (
        "filtered-00000-of-00001.parquet",
        [
            {
                "prompt": "Why?",
                "chosen": "Fish.",
                "chosen_model": "GPT4-Turbo",
                "rejected": "Cats.",
                "rejected_model": "bard",
                "subset": "alpacaeval-easy",
                "id": 0,
            }
        ],
        [(say("Why?"), "Fish.", "Cats.", None)],
        {},
    ),
    "Vezora/Code-Preference-Pairs": (
        "pairs.json",
        [{"input": "Why?", "accepted": "Fish.", "rejected": "Cats.", "ID": 1}],
        [(say("Why?"), "Fish.", "Cats.", None)],
        {},
    ),
    "Intel/orca_dpo_pairs": (
        "orca_rlhf.jsonl",
        [{"system": "Be brief.", "question": "Why?", "chosen": "Fish.", "rejected": "Cats."}],
        [(say("Why?", system="Be brief."), "Fish.", "Cats.", None)],
        {},
    ),
    "a data frame's csv": (
        "pairs.csv",
        [
            {"chosen": str(say("Why?", "Fish.")), "rejected": json.dumps(say("Why?", "Cats."))},
            {"chosen": "Why? Fish.", "rejected": "Why? Cats."},
        ],
        [(say("Why?"), "Fish.", "Cats.", None)] * 2,
        {},
    ),
    "a file of one's own": (
        "pairs.jsonl",
        [
            {"prompt": "Why?", "chosen": "Fish.", "rejected": "Cats."},
            {"instruction": "Translate.", "input": "Katze", "chosen": "cat", "rejected": "dog"},
            {"question": "Why?", "system": "", "chosen": "Fish.", "rejected": "Cats."},
        ],
        [
            (say("Why?"), "Fish.", "Cats.", None),
            (say("Translate.\nKatze"), "cat", "dog", None),
            (say("Why?"), "Fish.", "Cats.", None),
        ],
        {},
    ),
}
