"""What people said of answers, in one SQLite file.

An entry is one act of one rater: a like (+1), a dislike (-1), taking either back (0), or a better answer in the rater's
own words. Entries are only ever added; the latest rating of a rater counts. Each is a transaction of its own, on disk
before the call returns (write-ahead log, synchronous=FULL), so a crash loses nothing that was reported as stored, and
any number of pages and terminals may write at once.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

LIKE, WITHDRAWN, DISLIKE = 1, 0, -1
VERSION = 1
APPLICATION_ID = 0x66707066  # "fppf": tells our files from other people's databases
WAIT_SECONDS = 30.0  # for another writer; one needs milliseconds

SCHEMA = """
CREATE TABLE feedback (
  id INTEGER PRIMARY KEY,
  at TEXT NOT NULL,               -- UTC, ISO 8601
  rater TEXT NOT NULL,
  model TEXT NOT NULL,            -- as the endpoint names it
  prompt TEXT NOT NULL,           -- JSON: the chat before the answer, [{"role", "content"}, ...]
  answer TEXT NOT NULL,
  rating INTEGER CHECK (rating IN (-1, 0, 1)),
  rewrite TEXT CHECK (rewrite <> answer),
  CHECK ((rating IS NULL) <> (rewrite IS NULL))
);
CREATE INDEX feedback_prompt ON feedback (prompt);
"""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Entry:
    """One act of feedback: a rating or a rewrite."""

    id: int
    rater: str
    model: str
    prompt: Messages
    answer: str
    rating: int | None
    rewrite: str | None


class Store:
    """The feedback in `path`; the file is made by the first call.

    Raises:
        ValueError: the file is something else, or of a newer version; or an entry says nothing that can be learnt from.
        RuntimeError: the disk is full, or another writer holds the file for longer than `WAIT_SECONDS`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"feedback: expected a file, got the folder {self.path}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as db:
            self._check_or_create(db)

    def rate(self, prompt: Messages, answer: str, rating: int, *, rater: str, model: str) -> int:
        """Store a like (1), a dislike (-1) or the withdrawal of either (0); returns the entry's number."""
        if isinstance(rating, bool) or rating not in (DISLIKE, WITHDRAWN, LIKE):
            raise ValueError(f"rating must be 1 (like), -1 (dislike) or 0 (neither any more), got {rating!r}")
        return self._add(prompt, answer, rating, None, rater, model)

    def rewrite(self, prompt: Messages, answer: str, better: str, *, rater: str, model: str) -> int:
        """Store what the rater would have answered; returns the entry's number."""
        better = better.strip()
        if not better:
            raise ValueError("a rewrite must hold at least one word, got an empty one")
        if better == answer.strip():
            raise ValueError("a rewrite must differ from the answer it replaces, got the same text")
        return self._add(prompt, answer, None, better, rater, model)

    def entries(self) -> list[Entry]:
        """Everything, in the order it was said."""
        with self._connection() as db:
            rows = db.execute(
                "SELECT id, rater, model, prompt, answer, rating, rewrite FROM feedback ORDER BY id"
            ).fetchall()
        return [Entry(row[0], row[1], row[2], json.loads(row[3]), *row[4:]) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many likes, dislikes and rewrites there are, by the latest word of each rater on each answer."""
        said = Counter(rating for _, _, rating in current_ratings(self.entries()))
        with self._connection() as db:
            (rewrites,) = db.execute("SELECT COUNT(*) FROM feedback WHERE rewrite IS NOT NULL").fetchone()
        return {"likes": said[LIKE], "dislikes": said[DISLIKE], "rewrites": rewrites}

    def _add(
        self, prompt: Messages, answer: str, rating: int | None, rewrite: str | None, rater: str, model: str
    ) -> int:
        _check_prompt(prompt)
        row = (
            datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            *(rater, model, canonical(prompt), answer, rating, rewrite),
        )
        with self._connection() as db, _transaction(db):
            added = db.execute(
                "INSERT INTO feedback (at, rater, model, prompt, answer, rating, rewrite) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            assert added.lastrowid is not None
            return added.lastrowid

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one call: they may come from any thread, and the file may have been put back from a copy."""
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                yield db
        except sqlite3.OperationalError as error:
            raise RuntimeError(f"feedback: {self.path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"feedback: {self.path} is not a SQLite file ({error})") from error

    def _check_or_create(self, db: sqlite3.Connection) -> None:
        with _transaction(db):
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if application == 0 and tables == 0:
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif application != APPLICATION_ID:
                raise ValueError(
                    f"feedback: {self.path} is a database of another program: expected application_id "
                    f"{APPLICATION_ID:#x}, got {application:#x}"
                )
            elif version != VERSION:
                raise ValueError(
                    f"feedback: {self.path} has schema version {version}, and this program reads version {VERSION}"
                )


def current_ratings(entries: list[Entry]) -> list[tuple[str, str, int]]:
    """(prompt as canonical JSON, answer, rating): the latest word of each rater; what was taken back is left out."""
    latest: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        if entry.rating is not None:
            latest[entry.rater, canonical(entry.prompt), entry.answer] = entry.rating
    return [(prompt, answer, rating) for (_, prompt, answer), rating in latest.items() if rating != WITHDRAWN]


def canonical(prompt: Messages) -> str:
    """One spelling of a chat, so that equal prompts are equal strings."""
    return json.dumps(
        [{"role": m["role"], "content": m["content"]} for m in prompt],
        ensure_ascii=False,
        separators=(",", ":"),
    )


def _check_prompt(prompt: Messages) -> None:
    roles = [m.get("role") if isinstance(m, dict) else type(m).__name__ for m in prompt]
    if not roles or roles[-1] != "user" or not all(isinstance(m.get("content"), str) for m in prompt):
        raise ValueError(f"prompt must be chat messages that end with the user's, got roles {roles}")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
