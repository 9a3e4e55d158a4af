"""Files in the two layouts of the TL;DR data, made mechanically from plain text: recipes/tldr.yaml without Reddit.

    python scripts/tldr_sample.py book.txt another.txt --out tldr

A post is a paragraph, its "human" summary the paragraph's first sentence. A comparison shows two of three summaries:
the first sentence's first eight words, the whole first sentence, a sentence from elsewhere; the earlier of these is
chosen, nine times in ten. So "people" here like what is about the post, and short: what preference training changes
is known beforehand.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

WORDS = range(30, 66)  # words of a paragraph that becomes a post
SUMMARY = range(10, 26)  # words of its first sentence
SHORT = 8
NOISE = 0.1


def posts_of(file: Path) -> list[dict[str, str]]:
    """The usable paragraphs of a text, one a line or set apart by empty lines."""
    posts = []
    for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
        text = " ".join(paragraph.split())
        first = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
        if len(text.split()) in WORDS and len(first.split()) in SUMMARY:
            title = " ".join(text.split()[-5:])
            posts.append({"subreddit": file.stem, "title": title, "post": text, "summary": first})
    return posts


def comparisons_of(posts: list[dict[str, str]], rng: random.Random) -> list[dict[str, object]]:
    """Two comparisons for every post, in random order on the page."""
    rows: list[dict[str, object]] = []
    for post in posts:
        short = " ".join(post["summary"].split()[:SHORT]) + "."
        ranked = [short, post["summary"], rng.choice(posts)["summary"]]
        for better, worse in rng.sample(list(combinations(ranked, 2)), 2):
            if better == worse:  # the sentence from elsewhere was the post's own
                continue
            chosen = rng.random() >= NOISE
            shown = [better, worse]
            choice = 0 if chosen else 1
            if rng.random() < 0.5:
                shown, choice = shown[::-1], 1 - choice
            info = {key: post[key] for key in ("subreddit", "title", "post")}
            rows.append({"info": info, "summaries": [{"text": " " + text} for text in shown], "choice": choice})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="plain text files")
    parser.add_argument("--out", type=Path, default=Path("tldr"), help="folder for posts.jsonl and comparisons.jsonl")
    parser.add_argument("--posts", type=int, default=600, help="use at most this many paragraphs")
    args = parser.parse_args(arguments)
    rng = random.Random(0)
    posts = [post for file in sorted(args.texts) for post in posts_of(file)]
    rng.shuffle(posts)
    posts = posts[: args.posts]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("posts", posts), ("comparisons", comparisons_of(posts, rng))):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
