"""The KV block pool and its prefix cache, kept as runs of blocks instead of blocks.

vLLM keeps one object per KV block: a hash of the whole prefix up to the block's end, a reference
count, and links in one free list that is popped at the front. Only three things about a block can
ever be observed: whether it is free, where it stands in the free list, and which content it holds.
Neighbouring blocks of one request share all three, so this room keeps them as one `Piece`:

- Content is a trie. A `Node` is a segment of tokens that follows one particular prefix; a request's
  content is a path of nodes, and block b belongs to the node that holds its last token. Equal node
  and equal b mean equal prefix, hence vLLM's equal hash. Content that nobody else can reach (private
  prompts, answers that nobody quotes) has no node until a preemption makes the request itself a
  possible reader.
- A piece is a run [low, high) of physical blocks of one node with one reference count. vLLM does
  not merge duplicate blocks and serves the copy that was cached first, so a node keeps its pieces
  in the order in which they were cached.
- The free list is: first all blocks without content (vLLM prepends those when it frees them), of
  which only the number matters; then cached blocks, least recently freed first, each request's
  tail before its head. The latter is a linked list of pieces that is eaten from the front; a piece
  that is eaten loses blocks from its high end. Eating is put off: the number of blocks without
  content may go below zero, and `settle` pays before anybody looks at content or frees blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ersim.errors import bad_value

if TYPE_CHECKING:
    from ersim.engine.request import EngineRequest

FAR: Final = 1 << 60
"""Beyond every block index."""


class Node:
    """A segment of content after one particular prefix.

    key: (tokens of the parent used, content) under which the parent lists it, None for a private
    node that no other request can reach. users: live requests whose path runs through here.
    writer: the row in the decode bulk that grows into this node unwatched, if any.
    """

    __slots__ = ("children", "key", "parent", "pieces", "users", "writer")

    def __init__(self, parent: Node | None, key: tuple[int, object] | None) -> None:
        self.parent = parent
        self.key = key
        self.children: dict[tuple[int, object], Node] | None = None
        self.pieces: list[Piece] = []
        self.users = 1
        self.writer: EngineRequest | None = None


class Piece:
    """Physical blocks [low, high) of one node, `references` requests holding each of them.

    Without references the piece stands in the free list (before, after). `rest` is what was split
    off its high end while somebody held all of it. node is None for blocks whose content nobody can
    find again: of those only the number matters, so neighbours in the free list are merged.
    """

    __slots__ = ("after", "before", "high", "low", "node", "references", "rest")

    def __init__(self, node: Node | None, low: int, high: int, references: int) -> None:
        self.node = node
        self.low = low
        self.high = high
        self.references = references
        self.rest: Piece | None = None
        self.before: Piece
        self.after: Piece


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
        self.ends = ends = Piece(None, 0, 0, 0)  # head and tail of the free list in one
        ends.before = ends.after = ends

    # ---- the free list --------------------------------------------------------------------------

    def take(self, count: int) -> None:
        """Allocate `count` blocks (the caller has checked that they are free)."""
        self.free -= count
        self.unhashed -= count

    def settle(self) -> None:
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
            self._unlink(piece)
            if piece.node is not None:
                piece.node.pieces.remove(piece)
                self.prune(piece.node)

    def _unlink(self, piece: Piece) -> None:
        """Take a piece out of the free list; its links are cut lest a chain of old pieces stay alive."""
        piece.before.after = piece.after
        piece.after.before = piece.before
        piece.before = piece.after = None  # type: ignore[assignment]

    def _append(self, piece: Piece) -> None:
        """Put a piece that nobody holds any more at the end of the free list."""
        ends = self.ends
        last = ends.before
        piece.before = last
        piece.after = ends
        last.after = piece
        ends.before = piece
        self.free += piece.high - piece.low

    def _append_dead(self, count: int) -> None:
        """Put cached blocks that nobody can find any more at the end of the free list."""
        last = self.ends.before
        if last.node is None and last is not self.ends:
            last.high += count
            self.free += count
        else:
            self._append(Piece(None, 0, count, 0))

    def prune(self, node: Node) -> None:
        """Forget nodes that hold nothing and lead nowhere."""
        while not (node.users or node.pieces or node.children):
            parent = node.parent
            if parent is None:
                return
            if node.key is not None:
                children = parent.children
                if children and children.get(node.key) is node:
                    del children[node.key]
            node = parent

    # ---- content --------------------------------------------------------------------------------

    def resolve(self, request: EngineRequest) -> None:
        """Give the request its path: (node, first block, end block) for all that others may share.

        What lies behind the path is private; it becomes a node when a preemption makes the request
        itself a possible reader.
        """
        size = self.block_size
        path: list[tuple[Node, int, int]] = []
        node, used, start = self.root, 0, 0
        if request.block_keys is not None:
            for index, key in enumerate(request.block_keys):
                node = self._child(node, (-1, key))
                path.append((node, index, index + 1))
            first = request.prompt_tokens // size
            if first < len(path):
                request.answer = path[first][0]  # who quotes any of the answer's blocks passes through here
        elif request.segments is not None:
            for segment in request.segments:
                tokens = segment.tokens
                if tokens:
                    node = self._child(node, (used, segment.content_id))
                    path.append((node, start // size, (start + tokens) // size))
                    start += tokens
                    used = tokens
            if start != request.prompt_tokens:
                must = f"as long as the prompt ({request.prompt_tokens} tokens)"
                raise bad_value("request.segments", must, start)
            if request.output_content_id is not None:
                node = self._child(node, (used, request.output_content_id))
                path.append((node, start // size, FAR))
                request.answer = node
        request.path = path
        request.held = []
        request.tail = None
        request.hashed_blocks = 0

    def _child(self, node: Node, key: tuple[int, object]) -> Node:
        children = node.children
        if children is None:
            children = node.children = {}
        child = children.get(key)
        if child is None:
            child = children[key] = Node(node, key)
        else:
            child.users += 1
        return child

    def leave(self, request: EngineRequest) -> None:
        """The request is gone and needs its path no more."""
        path = request.path
        if path:
            for node, _, _ in path:
                node.users -= 1
            self.prune(path[-1][0])
            request.path = None
            request.answer = None

    def lookup(self, path: list[tuple[Node, int, int]], limit: int) -> tuple[list[Hit], int, int]:
        """Find the longest cached prefix of at most `limit` blocks.

        Returns the pieces, the number of blocks, and how many of those stand in the free list.
        """
        if self.unhashed < 0:
            self.settle()
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
                self._unlink(piece)
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
        """Make the request's full blocks up to `tokens` findable."""
        block, goal = request.hashed_blocks, tokens // self.block_size
        if block >= goal:
            return
        request.hashed_blocks = goal
        path = request.path
        assert path is not None
        if not path or path[-1][2] < goal:
            private = Node(path[-1][0] if path else None, None)
            path.append((private, path[-1][2] if path else 0, FAR))
        for node, _, end in path:
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

    def release_private(self, allocated_tokens: int, hashed_tokens: int) -> None:
        """Free the blocks of a request that is gone and had nothing that others could find."""
        total = -(-allocated_tokens // self.block_size)
        if not self.caching:
            self.free += total
            self.unhashed += total
            return
        if self.unhashed < 0:
            self.settle()
        full = hashed_tokens // self.block_size
        self.free += total - full
        self.unhashed += total - full
        if full:
            self._append_dead(full)

    def release(self, request: EngineRequest, allocated_tokens: int, hashed_tokens: int, gone: bool) -> None:
        """Free a request's blocks; `gone` when it will never look its own content up again."""
        path = request.path
        if not self.caching or (gone and not path):
            self.release_private(allocated_tokens, hashed_tokens)
            return
        if self.unhashed < 0:
            self.settle()
        size = self.block_size
        full = hashed_tokens // size
        rest = -(-allocated_tokens // size) - full
        self.free += rest
        self.unhashed += rest
        if gone:
            assert path
            end = path[-1][2]
            if full > end:
                self._append_dead(full - end)
                full = end
        elif path is None:
            request.path = []
            request.held = []
            request.tail = None
            request.hashed_blocks = 0
        self.cache(request, full * size)
        self._let_go(request)
        if gone:
            self.leave(request)

    def _let_go(self, request: EngineRequest) -> None:
        """Drop one reference from everything held, tail first."""
        for held, high in reversed(request.held):
            if held.rest is None:
                held.references -= 1
                if not held.references:
                    self._append(held)
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
                    self._append(piece)
        request.held = []
        request.tail = None
        request.hashed_blocks = 0
