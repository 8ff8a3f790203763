"""OASST's reward models (OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1): a Pythia under a head of
its own name, which has a bias."""

from functools import partial

from families.gpt_neox import NEOX_NAMES, NeoXBlock, read_neox
from model import FAMILIES, Family, RewardHead


def read_oasst(raw):
    if (pooling := raw.get("pooling", "last")) != "last":
        raw.refuse("pooling", pooling)
    return read_neox(raw) | {"head": "reward"}


OASST_NAMES = NEOX_NAMES | {"score": "out_proj"}
OASST_HEAD = partial(RewardHead, bias=True)
FAMILIES["gpt_neox_reward_model"] = Family(None, read_oasst, OASST_NAMES, NeoXBlock, OASST_HEAD)
