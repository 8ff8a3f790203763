"""Model FLOPs: what an objective's log-probabilities need, counted by formula.

    forward of a trie = 2 N T + 4 H C sum_layers(visible pairs) + 2 V D S

    N   weights in the linear layers of all blocks (norms, embedding and head are not in it)
    T   tokens of the trie, S those scored, D width, V vocabulary, H heads of C dimensions
    visible pairs   (query, key) that the attention rule lets see each other: a token sees its own
                    path back to the root, positions + 1 tokens, or a sliding window of them

Training costs three forwards (6 N per token), a reference log-probability one. Recomputation,
padding and scores behind the mask are not useful and not counted: none can raise a utilisation.
"""

import torch

from model import Transformer


class Flops:
    """The formula for one families.Config. shapes: (out, in) of one block's linear weights."""

    def __init__(self, config):
        self.config = config
        with torch.device("meta"):
            blocks = Transformer(config).blocks
        self.shapes = [tuple(p.shape) for p in blocks[0].parameters() if p.ndim == 2]
        self.linear = len(blocks) * sum(n * k for n, k in self.shapes)  # N

    def visible(self, trie):
        """(query, key) pairs of one trie that see each other, summed over layers."""
        path = torch.as_tensor(trie.positions) + 1  # tokens from the root to each token
        windows = self.config.windows
        seen = {w: int((path if w is None else path.clamp(max=w)).sum()) for w in set(windows)}
        return sum(seen[w] for w in windows)

    def forward(self, trie):
        """FLOPs of one forward of one trie."""
        c = self.config
        scores = 4 * c.heads * c.head_width * self.visible(trie)
        head = 2 * c.vocab * c.width * len(trie.source)
        return 2 * self.linear * len(trie.tokens) + scores + head

    def of_pairs(self, dataset, pairs, rule):
        """(training, reference) FLOPs of these pairs of a data.Dataset, each done once."""
        passes = ((3, rule.paths), (1, rule.reference_paths))
        return tuple(
            sum(n * self.forward(dataset.trie(i, paths)) for i in pairs) if paths else 0
            for n, paths in passes
        )
