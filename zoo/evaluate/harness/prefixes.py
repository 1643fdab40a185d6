"""Log-likelihoods of many continuations of many contexts, where a prefix that several begin with is read once.

Contexts that begin alike (with the examples of a few-shot prompt; with the question, of its answers) make a tree. A
model reads a piece of it from the state that the piece before left, and all that follow go on from a copy of its state:
recurrent matrices, or keys and values. Pieces are whole blocks of tokens, so that the rows of a call have read equally
many, and few programs are compiled. What is left of each is read padded on the right, or, from the beginning of a
document, packed: several in a row, each a segment of its own.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.model import LanguageModel
from zoo.states import State, take_rows

BLOCK = 16  # tokens
_LEVELS = 4  # of pieces on pieces: as many states of a batch are held at once
_ROWS = 16  # sequences that go on from a state at a time
_STATES = 1 << 30  # bytes of a batch's states, above which it has fewer rows
_CALL = 4096  # tokens of a call that begins documents
_LONGEST_OF_POWERS = 512  # tokens: longer rows are padded to a multiple of it, shorter ones to a power of two
_LABELS = 256  # logits of so many tokens exist at a time
_take = jax.jit(take_rows)


class Query(NamedTuple):
    """What is read, at least one token, and the tokens after it that are scored, at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    log_likelihood: float  # nats, of the continuation after the context
    is_greedy: bool  # each of its tokens is the likeliest


@dataclasses.dataclass
class Costs:
    """What reading queries took; those of several calls add up."""

    tokens: int = 0  # of the queries, each with its whole context
    read: int = 0  # by the model, padding not counted
    padding: int = 0
    states: int = 0  # copies from which reading went on
    state_bytes: int = 0  # of a sequence, the largest seen

    def __str__(self) -> str:
        again = 1 - self.read / self.tokens if self.tokens else 0.0
        text = f"read {self.read:,} of {self.tokens:,} tokens ({again:.1%} not read again; padding: {self.padding:,})"
        if self.states:
            text += f"; went on {self.states:,} times from a state of {self.state_bytes:,} bytes a sequence"
        return text


@dataclasses.dataclass
class _Leaf:
    """The tokens after the pieces above, and the queries that read exactly these: they differ in their last token."""

    tokens: Sequence[int]
    queries: list[int]


@dataclasses.dataclass
class _Piece:
    tokens: Sequence[int]  # whole blocks, after the pieces above
    pieces: list["_Piece"]
    leaves: list[_Leaf]


def score(
    model: LanguageModel,
    queries: Sequence[Query],
    *,
    costs: Costs | None = None,
    share: bool = True,
    pack: bool = True,
    on_scored: Callable[[int], Any] = lambda count: None,
) -> list[Score]:
    """log p(continuation | context) = sum_j log p(c_j | context, c_1 ... c_(j-1)), of each query, in nats.

    Sums are float64, on the host.

    Args:
      costs: added to.
      share: read what several contexts begin with once; False: each by itself, whole.
      pack: several short queries a row; False: one a row, padded.
      on_scored: called with the number of queries whose scores are known by then, of each batch.

    Raises:
      ValueError: a query without context or continuation.
    """
    for query in queries:
        if not len(query.context) or not len(query.continuation):
            raise ValueError("score: expected at least one token of context, and one of continuation, in each query")
    costs = Costs() if costs is None else costs
    inputs = [[*query.context, *query.continuation[:-1]] for query in queries]
    # The last token of a context predicts: what comes before it may be read for several.
    sharable = [(len(query.context) - 1) * share for query in queries]
    pieces, leaves = _tree(inputs, sharable, [*range(len(queries))], 0, _LEVELS)
    reader = _Reader(model, queries, _capacity(pieces, 0), costs, pack, on_scored)
    costs.tokens += sum(map(len, inputs))
    reader.visit(None, 0, [(0, piece) for piece in pieces], [(0, leaf) for leaf in leaves])
    return reader.scores


def _tree(
    inputs: list[list[int]], sharable: list[int], members: list[int], start: int, levels: int
) -> tuple[list[_Piece], list[_Leaf]]:
    """Of the `members`, which are alike before `start`: what several go on with, and the rest."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    rest = []
    for i in members:
        if levels and start + BLOCK <= sharable[i]:
            alike[tuple(inputs[i][start : start + BLOCK])].append(i)
        else:
            rest.append(i)
    pieces = []
    for group in alike.values():
        first, last = min(inputs[i] for i in group), max(inputs[i] for i in group)  # in between they are alike too
        if first[start:] == last[start:]:
            rest += group
            continue
        length = min(sharable[i] for i in group)
        common = next((t for t in range(start, length) if first[t] != last[t]), length)
        end = start + (common - start) // BLOCK * BLOCK
        pieces.append(_Piece(first[start:end], *_tree(inputs, sharable, group, end, levels - 1)))
    leaves: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i in rest:
        leaves[tuple(inputs[i][start:])].append(i)
    return pieces, [_Leaf(tokens, found) for tokens, found in leaves.items()]


def _capacity(pieces: list[_Piece], start: int) -> int:
    """The most tokens, with padding, that any state is given."""
    longest = 0
    for piece in pieces:
        end = start + len(piece.tokens)
        below = max([end + _padded(len(leaf.tokens)) for leaf in piece.leaves], default=end)
        longest = max(longest, below, _capacity(piece.pieces, end))
    return _padded(longest) if pieces else 0


def _padded(length: int) -> int:
    """One of few lengths, for few programs."""
    power = max(BLOCK, 1 << (length - 1).bit_length())
    return power if power <= _LONGEST_OF_POWERS else -(-length // _LONGEST_OF_POWERS) * _LONGEST_OF_POWERS


class _Reader:
    """Visits a tree. States of one batch a level are held."""

    def __init__(
        self,
        model: LanguageModel,
        queries: Sequence[Query],
        capacity: int,
        costs: Costs,
        pack: bool,
        on_scored: Callable[[int], Any],
    ):
        self._model, self._queries, self._capacity, self._costs = model, queries, capacity, costs
        self._pack, self._on_scored = pack, on_scored
        self._graphdef, self._parameters = nnx.split(model)
        self._rows = _ROWS
        if capacity:
            state = jax.eval_shape(lambda: model.init_state(1, capacity))
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            costs.state_bytes = max(costs.state_bytes, size)
            self._rows = min(_ROWS, _power_of_four(max(1, _STATES // size)))
        self.scores: list[Score] = [Score(math.nan, False)] * len(queries)

    def visit(
        self, state: State | None, start: int, pieces: list[tuple[int, _Piece]], leaves: list[tuple[int, _Leaf]]
    ) -> None:
        """Pieces and leaves, each with the row of `state` that it goes on from, after `start` tokens."""
        leaves = sorted(leaves, key=lambda row_leaf: -len(row_leaf[1].tokens))
        if state is None:
            self._score_documents([leaf for _, leaf in leaves])
        else:
            for batch in _batches(leaves, self._rows):
                self._score_from(self._take(state, [row for row, _ in batch]), start, [leaf for _, leaf in batch])
        by_length: dict[int, list[tuple[int, _Piece]]] = defaultdict(list)
        for row, piece in pieces:
            by_length[len(piece.tokens)].append((row, piece))
        for length, group in by_length.items():
            for batch in _batches(group, self._rows):
                rows = [row for row, _ in batch]
                after = self._begin(len(rows)) if state is None else self._take(state, rows)
                after = self._read(after, np.array([piece.tokens for _, piece in batch], np.int32))
                found = [[(i, p) for i, (_, piece) in enumerate(batch) for p in getattr(piece, name)]
                         for name in ("pieces", "leaves")]  # fmt: skip
                self.visit(after, start + length, *found)

    def _begin(self, rows: int) -> State:
        return _begin(self._graphdef, self._parameters, rows=_few(rows), capacity=self._capacity)

    def _take(self, state: State, rows: list[int]) -> State:
        """A state of these rows; those of padding are copies of the first."""
        self._costs.states += len(rows)
        rows = rows + rows[:1] * (_few(len(rows)) - len(rows))
        return _take(state, np.array(rows, np.int32))

    def _read(self, state: State, tokens: np.ndarray) -> State:
        """The state after `tokens` [rows, blocks], which go in powers of four blocks a call."""
        self._costs.read += tokens.size
        rows = _few(len(tokens))
        self._costs.padding += (rows - len(tokens)) * tokens.shape[1]
        tokens = np.concatenate([tokens, np.repeat(tokens[:1], rows - len(tokens), axis=0)])
        at, left = 0, tokens.shape[1]
        while left:
            length = BLOCK * _power_of_four(min(left // BLOCK, 16))
            state = _read(self._graphdef, self._parameters, state, tokens[:, at : at + length])
            at, left = at + length, left - length
        return state

    def _score_documents(self, leaves: list[_Leaf]) -> None:
        """From the beginning, longest first: packed into rows, or one a row."""
        while leaves:
            length = _padded(len(leaves[0].tokens))
            if self._pack:
                length = max(length, 16 * BLOCK)
            most = _power_of_four(max(1, _CALL // length))
            rows: list[list[_Leaf]] = []
            used: list[int] = []
            rest = []
            for at, leaf in enumerate(leaves):
                size = len(leaf.tokens)
                if len(rows) == most and min(used) + len(leaves[-1].tokens) > length:  # not even the shortest fits
                    rest += leaves[at:]
                    break
                row = next((r for r, n in enumerate(used) if n + size <= length), None) if self._pack else None
                if row is None and len(rows) < most:
                    rows.append([leaf])
                    used.append(size)
                elif row is None:
                    rest.append(leaf)
                else:
                    rows[row].append(leaf)
                    used[row] += size
            self._score(rows, length, None, 0)
            leaves = rest

    def _score_from(self, state: State, start: int, leaves: list[_Leaf]) -> None:
        self._score([[leaf] for leaf in leaves], _padded(max(len(leaf.tokens) for leaf in leaves)), state, start)

    def _score(self, rows: list[list[_Leaf]], length: int, state: State | None, start: int) -> None:
        tokens, segment_ids, positions = np.zeros((3, _few(len(rows)), length), np.int32)
        labels = []  # row, place, target; of the queries in `asked`, in order
        asked = []
        for row, leaves in enumerate(rows):
            begin = 0
            for segment, leaf in enumerate(leaves):
                end = begin + len(leaf.tokens)
                tokens[row, begin:end] = leaf.tokens
                segment_ids[row, begin:end] = segment + 1  # padding stays at 0, its positions too: every table has that
                positions[row, begin:end] = start + np.arange(end - begin)
                for query in leaf.queries:
                    continuation = self._queries[query].continuation
                    asked.append(query)
                    labels += [(row, end - len(continuation) + j, target) for j, target in enumerate(continuation)]
                begin = end
        read = sum(len(leaf.tokens) for leaves in rows for leaf in leaves)
        self._costs.read += read
        self._costs.padding += tokens.size - read
        padded = np.zeros((_few(len(labels)), 3), np.int32)
        padded[: len(labels)] = labels
        found = _label_scores(self._graphdef, self._parameters, tokens, segment_ids, positions, state, padded)
        nats, is_likeliest = (np.asarray(array)[: len(labels)] for array in found)
        at = 0
        for query in asked:
            end = at + len(self._queries[query].continuation)
            self.scores[query] = Score(float(nats[at:end].sum(dtype=np.float64)), bool(is_likeliest[at:end].all()))
            at = end
        self._on_scored(len(asked))


def _batches(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _power_of_four(most: int) -> int:
    """The largest that is at most so many."""
    return 4 ** ((most.bit_length() - 1) // 2)


def _few(count: int) -> int:
    """At least so many, a power of four: of few numbers of rows, for few programs."""
    return 4 ** (((count - 1).bit_length() + 1) // 2)


@functools.partial(jax.jit, static_argnames=("graphdef", "rows", "capacity"))
def _begin(graphdef: nnx.GraphDef, parameters: nnx.State, *, rows: int, capacity: int) -> State:
    return nnx.merge(graphdef, parameters).init_state(rows, capacity)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _read(graphdef: nnx.GraphDef, parameters: nnx.State, state: State, tokens: jax.Array) -> State:
    return nnx.merge(graphdef, parameters).hidden(tokens, state=state)[1]


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _label_scores(
    graphdef: nnx.GraphDef, parameters: nnx.State, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array,
    state: State | None, labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Of labels [N, (row, place, target)]: the targets' log-probabilities, and whether they are the likeliest [N]."""
    model = nnx.merge(graphdef, parameters)
    hidden, _ = model.hidden(tokens, segment_ids=segment_ids, positions=positions, state=state)
    row, place, target = labels.T

    def scores(hidden_target):
        hidden, target = hidden_target
        logits = model.logits(hidden[None])[0]
        of_target = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return of_target - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == target

    pieces = (-1, min(_LABELS, len(target)))
    of_pieces = jax.lax.map(scores, (hidden[row, place].reshape(*pieces, hidden.shape[-1]), target.reshape(pieces)))
    return jax.tree.map(jnp.ravel, of_pieces)
