"""Which images are held, in which order they came, and which go first where there is no room.

SIEVE (Zhang et al., NSDI 2024), over images:

    oldest  a  b  c  d  e  f  newest
                  ^ the hand

The hand walks from the oldest to the newest and begins anew. What was wanted again since it passed last is passed over once;
what was not goes. So what is pulled once, such as a scan or a night of builds, goes before what is pulled again and again.

What goes is an image: its manifest, the blobs that no other held manifest names, and the indexes of which nothing is left.
Blobs that no held manifest names are *loose*: they have a short age of their own, and go before any image.

Functions on a connection, each within the transaction of its caller.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proxy.names import Digest, parse_digest

LOOSE_AGE = 600.0
"""Seconds for which a blob is kept that no held manifest names."""
STEPS = 512
"""Of one transaction: others wait for it."""

Spared = Callable[[Digest], bool]


@dataclass(frozen=True, slots=True)
class Pull:
    """That of an image, at a time (seconds since the epoch). ``is_again``: it is no part of the one that brought it here."""

    digest: Digest
    when: float
    is_again: bool


@dataclass(frozen=True, slots=True)
class Evicted:
    """Content that is not held any more."""

    digest: Digest
    size: int


def enter(connection: sqlite3.Connection, digest: Digest, children: Iterable[Digest] | None, now: float) -> None:
    """Content is held from now on; ``children``: what it names, if it is a manifest."""
    if children is None:
        connection.execute(
            "INSERT OR IGNORE INTO loose SELECT ?1, ?2 WHERE NOT EXISTS "
            "(SELECT 1 FROM children JOIN blobs ON blobs.digest = parent WHERE children.digest = ?1)",
            (str(digest), now),
        )
        return
    connection.execute(
        "INSERT OR IGNORE INTO images (digest, place, pulled) SELECT ?1, ifnull(max(place), 0) + 1, ?2 FROM images",
        (str(digest), now),
    )
    connection.executemany("DELETE FROM loose WHERE digest = ?", [(str(digest),), *((str(child),) for child in children)])


def leave(connection: sqlite3.Connection, digest: Digest) -> None:
    """Content is held no more."""
    for table in ("images", "loose"):
        connection.execute(f"DELETE FROM {table} WHERE digest = ?", (str(digest),))  # noqa: S608 - our own words


def pulled(connection: sqlite3.Connection, pulls: Iterable[Pull]) -> None:
    """Images were pulled."""
    connection.executemany(
        "UPDATE images SET pulled = max(pulled, ?), is_wanted = is_wanted OR ? WHERE digest = ?",
        [(pull.when, pull.is_again, str(pull.digest)) for pull in pulls],
    )


def evict_loose(connection: sqlite3.Connection, before: float, is_spared: Spared) -> list[Evicted]:
    """Drops blobs that came before then and that no held manifest names, the oldest first, as many as one look finds."""
    rows = connection.execute("SELECT digest FROM loose WHERE since < ? ORDER BY since LIMIT ?", (before, STEPS)).fetchall()
    return [_drop(connection, digest) for digest in map(_digest, rows) if not is_spared(digest)]


def evict(connection: sqlite3.Connection, need: int, is_spared: Spared) -> list[Evicted]:
    """Drops images until ``need`` bytes of content are freed, or after ``STEPS`` steps of the hand.

    ``is_spared``: content that must stay now: it is pinned, or somebody pulls it.
    """
    (hand,) = connection.execute("SELECT place FROM hand").fetchone()
    gone: list[Evicted] = []
    for _ in range(STEPS):
        if sum(each.size for each in gone) >= need:
            break
        row = connection.execute(
            "SELECT digest, place, is_wanted FROM images WHERE place > ? ORDER BY place LIMIT 1", (hand,)
        ).fetchone()
        if row is None:
            hand = 0
            continue
        digest, hand = parse_digest(row[0]), row[1]
        if row[2]:
            connection.execute("UPDATE images SET is_wanted = 0 WHERE digest = ?", (str(digest),))
        else:
            gone += _drop_image(connection, digest, is_spared)
    connection.execute("UPDATE hand SET place = ?", (hand,))
    return gone


def _drop_image(connection: sqlite3.Connection, digest: Digest, is_spared: Spared) -> list[Evicted]:
    """Drops an image, unless it has to stay: it is spared, or an index of it is, or something that it alone has; an index
    also while an image of it is held."""
    key = (str(digest),)
    children = connection.execute(
        "SELECT child.digest, media_type IS NOT NULL, EXISTS (SELECT 1 FROM children AS other "
        "JOIN blobs AS held ON held.digest = other.parent WHERE other.digest = child.digest AND other.parent != ?1) "
        "FROM children AS child JOIN blobs USING (digest) WHERE parent = ?1",
        key,
    ).fetchall()
    above = "SELECT parent FROM children JOIN blobs ON blobs.digest = parent WHERE children.digest = ?"
    indexes = [_digest(row) for row in connection.execute(above, key).fetchall()]
    own = [parse_digest(child) for child, _, is_shared in children if not is_shared]
    if any(is_manifest for _, is_manifest, _ in children) or any(map(is_spared, (digest, *indexes, *own))):
        return []
    gone = [_drop(connection, each) for each in (digest, *own)]
    for index in indexes:
        gone += _drop_image(connection, index, is_spared)
    return gone


def _drop(connection: sqlite3.Connection, digest: Digest) -> Evicted:
    """Forgets content and all that is known of it; its file is to be removed."""
    key = (str(digest),)
    (size,) = connection.execute("SELECT size FROM blobs WHERE digest = ?", key).fetchone()
    for table in ("blobs", "links", "tags", "images", "loose"):
        connection.execute(f"DELETE FROM {table} WHERE digest = ?", key)  # noqa: S608 - our own words
    connection.execute("DELETE FROM children WHERE parent = ?", key)
    connection.execute("INSERT OR IGNORE INTO doomed VALUES (?)", key)
    return Evicted(digest, size)


def _digest(row: tuple[str]) -> Digest:
    return parse_digest(row[0])
