"""The KV block pool and its prefix cache, kept as runs of blocks instead of blocks.

vLLM keeps one object per KV block: a hash of the whole prefix up to the block's end, a reference
count, and links in one free list that is popped at the front. Only three things about a block can
ever be observed: whether it is free, where it stands in the free list, and which content it holds.
Neighbouring blocks of one request share all three, so this room keeps them as one `Piece`:

- Content is a trie. A `Node` is a segment of tokens that follows one particular prefix; a request's
  content is a path of nodes, and block b belongs to the node that holds its last token. Equal node
  and equal b mean equal prefix, hence vLLM's equal hash. Nodes that nobody else can reach (private
  prompts, answers that nobody quotes) are not made at all until a preemption makes the request
  itself a possible reader.
- A piece is a run [low, high) of physical blocks of one node with one reference count. vLLM does
  not merge duplicate blocks and serves the copy that was cached first, so a node keeps its pieces
  in the order in which they were cached.
- The free list is: first all blocks without content (vLLM prepends those when it frees them), of
  which only the number matters; then cached blocks, least recently freed first, each request's
  tail before its head. The latter is a linked list of pieces that is eaten from the front; a piece
  that is eaten loses blocks from its high end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ersim.engine.request import EngineRequest

FAR = 1 << 60
"""Beyond every block index."""


class Node:
    """A segment of content after one particular prefix.

    users: live requests whose path runs through here. writer: the one row in the decode bulk that
    grows into this node unwatched, if any. children is keyed by (tokens of this node used, content).
    """

    __slots__ = ("children", "key", "parent", "pieces", "users", "writer")

    def __init__(self, parent: Node | None, key: tuple[int, object] | None) -> None:
        self.parent = parent
        self.key = key
        self.children: dict[tuple[int, object], Node] = {}
        self.pieces: list[Piece] = []
        self.users = 0
        self.writer: EngineRequest | None = None


class Piece:
    """Physical blocks [low, high) of one node, `references` requests holding each of them.

    With no references the piece stands in the free list (before, after). `rest` is what was split
    off its high end while somebody held all of it. node is None when nobody can ever find it again.
    """

    __slots__ = ("after", "before", "high", "low", "node", "references", "rest")

    def __init__(self, node: Node | None, low: int, high: int, references: int) -> None:
        self.node = node
        self.low = low
        self.high = high
        self.references = references
        self.rest: Piece | None = None
        self.before: Piece = self
        self.after: Piece = self


Hit = tuple[Piece, int, int]
"""Blocks [from, to) of a piece that a lookup found."""


class BlockPool:
    """Counts of free blocks, the free list of cached pieces, and the trie of content."""

    def __init__(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.total = num_blocks - 1
        self.free = self.total
        self.unhashed = self.total
        self.block_size = block_size
        self.caching = caching
        self.root = Node(None, None)
        self.ends = Piece(None, 0, 0, 0)

    # ---- the free list --------------------------------------------------------------------------

    def take(self, count: int) -> None:
        """Allocate `count` blocks (the caller has checked that they are free)."""
        self.free -= count
        self.unhashed -= count
        if self.unhashed < 0:
            self.evict()

    def evict(self) -> None:
        """Pay for an overdrawn count of blocks without content with the oldest cached ones."""
        ends = self.ends
        missing = -self.unhashed
        self.unhashed = 0
        while missing:
            piece = ends.after
            size = piece.high - piece.low
            if size > missing:
                piece.high -= missing
                return
            missing -= size
            ends.after = piece.after
            piece.after.before = ends
            if piece.node is not None:
                piece.node.pieces.remove(piece)
                self.prune(piece.node)

    def append_free(self, piece: Piece) -> None:
        """Put a piece that nobody holds any more at the end of the free list."""
        ends = self.ends
        last = ends.before
        piece.before = last
        piece.after = ends
        last.after = piece
        ends.before = piece
        self.free += piece.high - piece.low

    def prune(self, node: Node) -> None:
        """Forget nodes that hold nothing and lead nowhere."""
        while not (node.users or node.pieces or node.children):
            parent = node.parent
            if parent is None:
                return
            assert node.key is not None
            if parent.children.get(node.key) is node:
                del parent.children[node.key]
            node = parent

    # ---- content --------------------------------------------------------------------------------

    def resolve(self, request: EngineRequest) -> list[tuple[Node, int, int]] | None:
        """The path of a request: (node, first block, end block); None when nobody shares any of it."""
        if request.block_keys is not None:
            return self._resolve_keys(request)
        segments = request.segments
        answer = request.output_content_id
        if segments is None and answer is None:
            return None
        size = self.block_size
        node, used, start = self.root, 0, 0
        path = []
        if segments is None:
            node = Node(node, (0, None))
            node.users = 1
            path.append((node, 0, request.prompt_tokens // size))
            used = start = request.prompt_tokens
        else:
            for segment in segments:
                tokens = segment.tokens
                if tokens:
                    node = self._child(node, (used, segment.content_id))
                    path.append((node, start // size, (start + tokens) // size))
                    start += tokens
                    used = tokens
        if answer is None:
            node = Node(node, (used, None))
            node.users = 1
        else:
            node = self._child(node, (used, answer))
        path.append((node, start // size, FAR))
        return path

    def _resolve_keys(self, request: EngineRequest) -> list[tuple[Node, int, int]]:
        node = self.root
        path = []
        keys = request.block_keys
        assert keys is not None
        for index, key in enumerate(keys):
            node = self._child(node, (-1, key))
            path.append((node, index, index + 1))
        node = Node(node, (-1, None))
        node.users = 1
        path.append((node, len(keys), FAR))
        return path

    def _child(self, node: Node, key: tuple[int, object]) -> Node:
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = Node(node, key)
        child.users += 1
        return child

    def leave(self, path: list[tuple[Node, int, int]]) -> None:
        """A request that used this path is gone."""
        for node, _, _ in path:
            node.users -= 1
        self.prune(path[-1][0])

    def lookup(self, path: list[tuple[Node, int, int]], limit: int) -> tuple[list[Hit], int, int]:
        """Find the longest cached prefix of at most `limit` blocks.

        Returns the pieces, the number of blocks, and how many of those stand in the free list.
        """
        hits: list[Hit] = []
        block = evictable = 0
        for node, _, end in path:
            if end > limit:
                end = limit
            pieces = node.pieces
            while block < end:
                stop = end
                for piece in pieces:  # the first that covers the block wins, until an older one does
                    if piece.low <= block < piece.high:
                        break
                    if block < piece.low < stop:
                        stop = piece.low
                else:
                    return hits, block, evictable
                if piece.high < stop:
                    stop = piece.high
                hits.append((piece, block, stop))
                if not piece.references:
                    evictable += stop - block
                block = stop
        return hits, block, evictable

    def acquire(self, request: EngineRequest, hits: list[Hit]) -> None:
        """Let the request hold the blocks that its lookup found."""
        held = request.held
        for piece, low, high in hits:
            piece = self._cut(piece, low, high)
            if not piece.references:
                piece.before.after = piece.after
                piece.after.before = piece.before
                self.free -= high - low
            piece.references += 1
            held.append((piece, high))

    def _cut(self, piece: Piece, low: int, high: int) -> Piece:
        """Split a piece so that [low, high) is a piece of its own, and return that."""
        if piece.low < low:
            piece = self._split(piece, low)
        if high < piece.high:
            self._split(piece, high)
        return piece

    def _split(self, piece: Piece, at: int) -> Piece:
        """Cut a piece in two; it keeps its low end. Returns the high end, which is freed earlier."""
        upper = Piece(piece.node, at, piece.high, piece.references)
        piece.high = at
        if piece.references:
            upper.rest = piece.rest
            piece.rest = upper
        else:
            upper.before = piece.before
            upper.after = piece
            piece.before.after = upper
            piece.before = upper
        assert piece.node is not None
        pieces = piece.node.pieces
        pieces.insert(pieces.index(piece) + 1, upper)
        return upper

    def cache(self, request: EngineRequest, tokens: int) -> None:
        """Make the request's full blocks up to `tokens` findable (it has a path)."""
        block, goal = request.hashed_blocks, tokens // self.block_size
        if block >= goal:
            return
        assert request.path is not None
        for node, _, end in request.path:
            if end <= block:
                continue
            if end > goal:
                end = goal
            tail, pieces = request.tail, node.pieces
            if (
                tail is not None
                and pieces
                and pieces[-1] is tail
                and tail.high == block
                and tail.references == 1
                and tail.rest is None
            ):
                tail.high = end
            else:
                request.tail = tail = Piece(node, block, end, 1)
                pieces.append(tail)
                request.held.append((tail, FAR))
            block = end
            if block == goal:
                break
        request.hashed_blocks = goal

    def release(self, request: EngineRequest, allocated_tokens: int, hashed_tokens: int, gone: bool) -> None:
        """Free a request's blocks; `gone` when it will never look its own content up again."""
        size = self.block_size
        total = -(-allocated_tokens // size)
        if not self.caching:
            self.free += total
            self.unhashed += total
            return
        path = request.path
        full = hashed_tokens // size
        if path is None:
            if full:
                node = None
                if not gone:
                    node = Node(None, None)
                    node.users = 1
                    request.path = [(node, 0, FAR)]
                    request.held = []
                    request.tail = None
                    request.hashed_blocks = 0
                piece = Piece(node, 0, full, 0)
                if node is not None:
                    node.pieces.append(piece)
                self.append_free(piece)
        else:
            self.cache(request, hashed_tokens)
            self._let_go(request)
            if gone:
                self.leave(path)
        self.free += total - full
        self.unhashed += total - full

    def _let_go(self, request: EngineRequest) -> None:
        """Drop one reference from everything held, tail first."""
        for held, high in reversed(request.held):
            if held.rest is None:
                held.references -= 1
                if not held.references:
                    self.append_free(held)
                continue
            chain = []
            piece: Piece | None = held
            while piece is not None and piece.low < high:
                chain.append(piece)
                piece = piece.rest
            for piece in reversed(chain):
                piece.references -= 1
                if not piece.references:
                    piece.rest = None
                    self.append_free(piece)
        request.held = []
        request.tail = None
        request.hashed_blocks = 0
