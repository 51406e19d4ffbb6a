"""`python -m tests.golden [--update] [name ...]`; see `tests.golden`."""

import argparse
import difflib
import sys

from tests.golden.scene import SCENARIOS, Scene


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("--update", action="store_true", help="write what the cores do now")
    parser.add_argument("names", nargs="*", help="stories, without .txt; all if none is named")
    args = parser.parse_args()
    differing = 0
    for path in sorted(SCENARIOS.glob("*.txt")):
        if args.names and path.stem not in args.names:
            continue
        before = path.read_text()
        after = Scene().play(before, path.stem)
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), path.name, path.name, lineterm=""
        )
        differing += before != after
        sys.stdout.writelines(line + "\n" for line in lines)
        if args.update and before != after:
            path.write_text(after)
    sys.stdout.write(f"{differing} stories {'written' if args.update else 'differ'}\n")
    return 1 if differing and not args.update else 0


if __name__ == "__main__":
    sys.exit(main())
