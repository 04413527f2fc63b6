"""Every eviction policy as its paper tells it, in numpy, one token and one head at a time: the oracle of test_policies.

A `Layer` is one layer of one sequence. It knows all queries, keys and values from the start and keeps, for each KV
head, the list of the positions that are live. Nothing here is shared with dms_jax, slots least of all.
"""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Layer:
    """The full cache; a method overrides who is dropped, or what is read.

    q `[T, H, D]`, k, v `[T, K, D]`, logit `[T, K]` eviction logits, chance `[K, T]` numbers in [0, 1).
    """

    def __init__(self, q, k, v, logit, chance, budget=None, page=None, window=0, offset=0):
        self.q, self.k, self.v, self.logit, self.chance = (np.asarray(x, np.float64) for x in (q, k, v, logit, chance))
        self.budget, self.page, self.window, self.offset = budget, page, window, offset
        self.heads = range(self.k.shape[1])
        self.group = self.q.shape[1] // self.k.shape[1]
        self.live = [[] for _ in self.heads]

    def read(self, p, h, positions):
        """Output `[G, D]` of token p's queries of head h over these positions, and the weights `[G, n]`."""
        q = self.q[p, h * self.group : (h + 1) * self.group]
        weights = softmax(q @ self.k[positions, h].T * q.shape[-1] ** -0.5)
        return weights @ self.v[positions, h], weights

    def prompt(self, start, count):
        """A chunk of a prompt: the last token's output `[H * D]`, and what each token saw, summed over heads."""
        seen, summed = [], [dict.fromkeys(self.live[h], 0.0) for h in self.heads]
        for p in range(start, start + count):
            outs, last, positions = [], [], []
            for h in self.heads:
                self.live[h].append(p)
                positions.append(self.visible(h, p))
                out, weights = self.read(p, h, positions[h])
                for position, weight in zip(positions[h], weights.sum(axis=0), strict=True):
                    summed[h][position] = summed[h].get(position, 0.0) + weight
                outs.append(out)
                last.append(dict(zip(positions[h], weights.sum(axis=0), strict=True)))
            seen.append(sum(map(len, positions)))
        self.after_prompt(start + count - 1, summed, last)
        return np.concatenate(outs).ravel(), seen

    def step(self, p):
        """A decode step: output `[H * D]`, and how many tokens each head read."""
        outs, reads, last = [], [], []
        for h in self.heads:
            self.make_room(h, p)
            self.live[h].append(p)
            positions = self.visible(h, p)
            out, weights = self.read(p, h, positions)
            outs.append(out)
            reads.append(self.cost(h, positions))
            last.append(dict(zip(positions, weights.sum(axis=0), strict=True)))
        self.after_step(last)
        return np.concatenate(outs).ravel(), reads

    # What a method is

    def visible(self, h, p):
        return list(self.live[h])

    def cost(self, h, positions):
        return len(positions)

    def make_room(self, h, p):
        pass

    def after_prompt(self, p, summed, last):
        pass

    def after_step(self, last):
        pass


class DMS(Layer):
    """Section 3.2: token j, marked by what is read off token j + o, is gone once its distance exceeds w."""

    def visible(self, h, p):
        def marked(j):
            return self.logit[j + self.offset, h] > 0

        self.live[h] = [j for j in range(p + 1) if p - j <= self.window or not marked(j)]
        return list(self.live[h])


class StreamingLLM(Layer):
    """The first four tokens and the most recent ones."""

    def make_room(self, h, p):
        newest = range(max(0, p - (self.budget - 4) + 1), p)
        self.live[h] = sorted({*range(min(4, p)), *newest})

    def after_prompt(self, p, summed, last):
        for h in self.heads:
            self.make_room(h, p + 1)
            if p + 1 > self.budget:  # one more than before a step, whose token is still to come
                self.live[h] = [*range(4), *range(p + 1 - (self.budget - 4), p + 1)]


class Scored(Layer):
    """Whoever `worst` names leaves, one at a time, until the budget is kept."""

    def make_room(self, h, p):
        while len(self.live[h]) >= self.budget:
            self.live[h].remove(self.worst(h, p))

    def after_prompt(self, p, summed, last):
        self.look(summed, last)
        for h in self.heads:
            while len(self.live[h]) > self.budget:
                self.live[h].remove(self.worst(h, p))

    def after_step(self, last):
        self.look(last, last)

    def look(self, summed, last):
        pass


class TOVA(Scored):
    """The least attended by the newest query, averaged over the layer's heads, which all keep the same."""

    def look(self, summed, last):
        self.mean = {p: sum(weights[p] for weights in last) for p in last[0]}

    def worst(self, h, p):
        return min(self.live[h], key=self.mean.__getitem__)


class H2O(Scored):
    """Attention summed over all queries so far; half of the budget is for the most recent."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.total = [{} for _ in self.heads]

    def look(self, summed, last):
        for h in self.heads:
            for position, weight in summed[h].items():
                self.total[h][position] = self.total[h].get(position, 0.0) + weight

    def worst(self, h, p):
        old = [j for j in self.live[h] if j <= p - self.budget // 2]
        return min(old, key=self.total[h].__getitem__)


class KNorm(Scored):
    """The largest key norm goes."""

    def worst(self, h, p):
        return max(self.live[h], key=lambda j: np.sqrt((self.k[j, h] ** 2).sum()))


class Random(Scored):
    """The smallest of the numbers that tokens drew goes."""

    def worst(self, h, p):
        return min(self.live[h], key=lambda j: self.chance[h, j])


class Quest(Layer):
    """Pages of consecutive tokens; those with the largest bound on a score are read, and the newest always."""

    def step(self, p):
        self.decoding = True
        return super().step(p)

    def prompt(self, start, count):
        self.decoding = False  # a prompt reads all
        return super().prompt(start, count)

    def visible(self, h, p):
        if not self.decoding:
            return list(self.live[h])
        bounds = {}
        newest = p // self.page
        for page in range(newest):
            keys = self.k[page * self.page : (page + 1) * self.page, h]
            low, high = keys.min(axis=0), keys.max(axis=0)
            queries = self.q[p, h * self.group : (h + 1) * self.group]
            bounds[page] = max(np.maximum(q * low, q * high).sum() for q in queries)
        chosen = sorted(bounds, key=bounds.__getitem__)[::-1][: self.budget // self.page - 1]
        return [j for j in self.live[h] if j // self.page in (*chosen, newest)]

    def cost(self, h, positions):
        return len(positions) + -(-len(self.live[h]) // self.page)  # and a summary for each page that is held
