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
    drawn: the random numbers of an eviction at a position; `drawn.uniform(p)` `[K, T]`, `drawn.normal(p)` `[D, R]`.
    every: steps from one eviction to the next. observed: queries whose attention counts.
    """

    def __init__(
        self, q, k, v, logit, chance, budget=None, page=None, window=0, offset=0, drawn=None, every=1, observed=0
    ):
        self.q, self.k, self.v, self.logit, self.chance = (np.asarray(x, np.float64) for x in (q, k, v, logit, chance))
        self.budget, self.page, self.window, self.offset = budget, page, window, offset
        self.drawn, self.every, self.observed = drawn, every, observed
        self.heads = range(self.k.shape[1])
        self.group = self.q.shape[1] // self.k.shape[1]
        self.live = [[] for _ in self.heads]
        self.seen = []  # of each query so far: in each head, the weight of each position

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
            self.seen.append(last)
        self.after_prompt(start + count - 1, summed, last)
        return np.concatenate(outs).ravel(), seen

    def step(self, p):
        """A decode step: output `[H * D]`, and how many tokens each head read."""
        outs, reads, last = [], [], []
        for h in self.heads:
            before = len(self.live[h])
            self.make_room(h, p)
            again = self.rereads * before if len(self.live[h]) < before else 0
            self.live[h].append(p)
            positions = self.visible(h, p)
            out, weights = self.read(p, h, positions)
            outs.append(out)
            reads.append(self.cost(h, positions) + int(np.ceil(again)))
            last.append(dict(zip(positions, weights.sum(axis=0), strict=True)))
        self.seen.append(last)
        self.after_step(last)
        return np.concatenate(outs).ravel(), reads

    # What a method is

    rereads = 0  # the share of a stored token that an eviction reads again

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
    """Whoever `worst` names leaves, one at a time, until the budget is kept; every `every` steps."""

    def make_room(self, h, p):
        if len(self.live[h]) >= self.budget + self.every - 1:
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


class Ranked(Scored):
    """All tokens are ranked at an eviction, from what is then live, and the lowest leave together."""

    def make_room(self, h, p):
        if len(self.live[h]) >= self.budget + self.every - 1:
            self.keep(h, p, self.budget - 1)

    def after_prompt(self, p, summed, last):
        self.look(summed, last)
        for h in self.heads:
            if len(self.live[h]) > self.budget:
                self.keep(h, p, self.budget)

    def keep(self, h, p, most):
        score = {**self.scores(h, p), **dict.fromkeys(self.untouchable(h, p), np.inf)}
        self.live[h] = sorted(sorted(self.live[h], key=lambda j: (score[j], j))[-most:])

    def untouchable(self, h, p):
        return ()


class KeyDiff(Ranked):
    """The keys most like the mean of the normalised keys leave."""

    rereads = 0.5

    def scores(self, h, p):
        unit = {j: self.k[j, h] / np.linalg.norm(self.k[j, h]) for j in self.live[h]}
        mean = np.mean(list(unit.values()), axis=0)
        return {j: -(x @ mean) / np.linalg.norm(mean) for j, x in unit.items()}


class RandomAttention(Ranked):
    """The most recent half of the budget stays, and chance decides anew about the others."""

    def scores(self, h, p):
        drawn = self.drawn.uniform(p)
        return {j: drawn[h, j] for j in self.live[h]}

    def untouchable(self, h, p):
        return [j for j in self.live[h] if j > p - self.budget // 2]


class Observing(Ranked):
    """What the last `observed` queries before an eviction attend to, at most as far back as the last eviction.

    Where a prompt ended among these queries, the last `observed` of the prompt count.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.queries = [[] for _ in self.heads]  # indices into `seen`

    def after_prompt(self, p, summed, last):
        count = min(self.observed, len(summed[0]))
        of_prompt = [n for n, seen in enumerate(self.seen) if n >= self.read_until][-count:]
        self.read_until = len(self.seen)
        for h in self.heads:
            self.queries[h] += of_prompt
        super().after_prompt(p, summed, last)

    read_until = 0

    def after_step(self, last):
        self.read_until = len(self.seen)
        for h in self.heads:
            to_go = self.budget + self.every - 1 - len(self.live[h])
            self.queries[h] = [*self.queries[h], len(self.seen) - 1] if to_go < self.observed else []

    def keep(self, h, p, most):
        super().keep(h, p, most)
        if most < self.budget:
            self.queries[h] = []

    def attention(self, h):
        """In the order of positions, averaged over queries."""
        seen = [self.seen[n][h] for n in self.queries[h]]
        total = np.array([sum(weights.get(j, 0.0) for weights in seen) for j in sorted(self.live[h])])
        return total / total.sum()

    def neighbours(self, x, width):
        return [x[max(0, n - width // 2) : n + width // 2 + 1] for n in range(len(x))]


class SnapKV(Observing):
    """Attention, the largest of seven neighbours; the observing tokens stay."""

    def scores(self, h, p):
        return dict(zip(sorted(self.live[h]), map(max, self.neighbours(self.attention(h), 7)), strict=True))

    def untouchable(self, h, p):
        return [j for j in self.live[h] if j > p - self.observed]


class RKV(SnapKV):
    """0.1 of that, less 0.9 of the softmax of the mean cosine with other keys."""

    rereads = 0.5

    def scores(self, h, p):
        live = sorted(self.live[h])
        unit = self.k[live, h] / np.linalg.norm(self.k[live, h], axis=-1, keepdims=True)
        cosine = unit @ unit.T
        for n in range(len(live)):
            cosine[n, n] = 0.0
            alike = [m for m in range(len(live)) if cosine[n, m] > 0.5]
            if alike:
                cosine[n, alike[-1]] = 0.0
        redundancy = softmax(cosine.mean(axis=-1))
        attention = super().scores(h, p)
        return {j: 0.1 * attention[j] - 0.9 * x for j, x in zip(live, redundancy, strict=True)}


class VaSEAttnV(Observing):
    """Four sinks, the widest values, and of the others a draw by attention averaged over five neighbours."""

    def keep(self, h, p, most):
        live = sorted(self.live[h])
        chosen = [j for j in live if j < 4]
        widest = sorted(live, key=lambda j: -np.ptp(self.v[j, h]))[: self.budget // 4]
        chosen += [j for j in widest if j not in chosen]
        chance = dict(zip(live, (sum(x) / 5 for x in self.neighbours(self.attention(h), 5)), strict=True))
        noise = -np.log(-np.log(self.drawn.uniform(p)[h]))
        others = sorted((j for j in live if j not in chosen), key=lambda j: -(np.log(chance[j]) + noise[j]))
        self.live[h] = sorted(chosen + others[: most - len(chosen)])
        if most < self.budget:
            self.queries[h] = []


class VaSEDKV(Ranked):
    """The largest products of the squared lengths of projected key and value stay."""

    rereads = 1

    def scores(self, h, p):
        g = self.drawn.normal(p)
        return {
            j: np.sum((self.k[j, h] @ g) ** 2) * np.sum((self.v[j, h] @ g[: self.v.shape[-1]]) ** 2)
            for j in self.live[h]
        }


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
