"""What the file tools make of what their scripts printed: words for the model. Sans-I/O."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fireclaw.agents import scripts
from fireclaw.errors import FireclawError

if TYPE_CHECKING:
    from fireclaw.agents.ports import CommandResult

MAX_EDITED: Final = 1 << 20  # bytes of a file that can be edited
MAX_ENTRIES: Final = 300
MAX_MATCHES: Final = 300
_MATCH_SHOWN: Final = 200  # characters of a line


class ToolError(FireclawError):
    """A call that could not do what it should; the message is for the model."""

    code = "tool"


@dataclass(frozen=True)
class Content:
    """A part of a file.

    Attributes:
        size: the whole file's bytes.
        ends: the whole file's line ends; a last line without one does not count.
        data: the bytes from the first line asked for on.
    """

    size: int
    ends: int
    data: bytes


def check_status(path: str, result: CommandResult) -> None:
    """Raise what a script's status means.

    Args:
        path: as the model wrote it.
        result: of the script.

    Raises:
        ToolError: it is not 0.
    """
    status = result.status
    if result.timed_out:
        raise ToolError(f"error: {path!r} could not be reached in time; is something in its way very slow?")
    if status == scripts.MISSING:
        raise ToolError(f"error: there is no {path!r}. {_beside(path, result.stdout)}")
    reasons = {
        scripts.FOLDER: f"{path!r} is a folder; list_files shows what is in it",
        scripts.SPECIAL: f"{path!r} is not a regular file (a device, a pipe or a socket)",
        scripts.REFUSED: f"you have no permission for {path!r}; you are the user agent",
        scripts.DANGLING: f"{path!r} is a symbolic link to something that does not exist",
    }
    if status in reasons:
        raise ToolError(f"error: {reasons[status]}")
    if status:
        said = result.stderr.decode(errors="replace").strip().splitlines()
        raise ToolError(f"error: {path!r}: {said[-1] if said else f'it failed with status {status}'}")


def _beside(path: str, listing: bytes) -> str:
    names = listing.decode(errors="replace").splitlines()
    if not names:
        return "Its folder is empty or does not exist."
    near = difflib.get_close_matches(path.rpartition("/")[2], names, n=1)
    return f"Did you mean {near[0]!r}? " if near else f"In its folder: {', '.join(names[:20])}"


def parse_read(result: CommandResult) -> Content:
    """Read what the script ``READ`` printed.

    Raises:
        ToolError: the machine printed something else.
    """
    counts, _, data = result.stdout.partition(b"\n")
    numbers = counts.split()
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ToolError("error: the machine's answer makes no sense")
    ends, size = (int(number) for number in numbers)
    return Content(size, ends, data)


def show_content(path: str, content: Content, start: int, count: int | None, limit: int) -> str:
    """Show lines of a file, whole ones where they fit, and say how to go on.

    Args:
        path: as the model wrote it.
        content: the bytes from ``start`` on, ``limit`` + 1 of them if there are so many.
        start: number of the first line.
        count: how many lines are wanted; None: as many as fit.
        limit: bytes to show.

    Raises:
        ToolError: there is nothing to show.
    """
    if b"\0" in content.data:
        raise ToolError(f"error: {path!r} is a binary file of {content.size} bytes; look at it with a command, e.g. od")
    lines = re.findall(rb"[^\n]*\n|[^\n]+", content.data)  # as tail(1) counts them; Python's know more line ends
    if not lines and start == 1:
        return "[the file is empty]"
    if not lines:
        raise ToolError(f"error: {path!r} has only {content.ends} lines")
    shown = _whole_lines(lines[:count], limit)
    if not shown:
        cut = lines[0][:limit].decode(errors="replace")
        return f"{cut}\n[line {start} is cut after {limit} bytes; a command, e.g. cut -c, shows its rest]"
    text = b"".join(shown).decode(errors="replace")
    end = start + len(shown) - 1
    is_end = len(content.data) <= limit and len(shown) == len(lines)
    if start == 1 and is_end:
        return text
    total, more = (end, "") if is_end else (max(content.ends, end + 1), f"; go on with start={end + 1}")
    return f"{text.rstrip(chr(10))}\n[lines {start} to {end} of {total}{more}]"


def _whole_lines(lines: list[bytes], limit: int) -> list[bytes]:
    """Return the first lines that fit into so many bytes."""
    used = 0
    for number, line in enumerate(lines):
        used += len(line)
        if used > limit:
            return lines[:number]
    return lines


def edited(path: str, data: bytes, old: str, new: str, *, everywhere: bool) -> tuple[bytes, str]:
    """Replace a piece of text.

    Works on bytes, so that what is not UTF-8 elsewhere in the file stays as it is. Where the file has line ends of
    two characters, so has the text.

    Returns:
        The new bytes, and what to tell the model.

    Raises:
        ToolError: the text is not there, or in several places.
    """
    wanted, instead = old.encode(errors="replace"), new.encode(errors="replace")
    if b"\r\n" in data and b"\r\n" not in wanted:
        wanted, instead = (text.replace(b"\n", b"\r\n") for text in (wanted, instead))
    if wanted == instead:
        raise ToolError('error: "old" and "new" are the same')
    count = data.count(wanted)
    if not count:
        raise ToolError(f'error: the text in "old" is not in {path!r}. {_nearest_line(data, old)}')
    if count > 1 and not everywhere:
        places = [_line_number(data, match.start()) for match in re.finditer(re.escape(wanted), data)]
        numbers = ", ".join(map(str, places[:10]))
        raise ToolError(
            f'error: the text in "old" is in {path!r} {count} times (lines {numbers}); write more of the text around'
            ' it, or "all": true'
        )
    where = f"line {_line_number(data, data.index(wanted))}" if count == 1 else f"{count} places"
    return data.replace(wanted, instead), f"changed {path} in {where}"


def _line_number(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


def _nearest_line(data: bytes, old: str) -> str:
    lines = data.decode(errors="replace").splitlines()
    wanted = next((line for line in old.splitlines() if line.strip()), "")
    near = difflib.get_close_matches(wanted, lines[:5000], n=1, cutoff=0.5)
    if not near:
        return "Read the file first, and copy the text exactly."
    return f"The nearest is line {lines.index(near[0]) + 1}: {near[0][:_MATCH_SHOWN]}"


def show_listing(result: CommandResult, limit: int) -> str:
    """Show what the script ``LIST`` printed: folders with a slash at the end, links with their target, sizes."""
    entries = sorted(filter(None, map(_entry, result.stdout.decode(errors="replace").splitlines())))
    if not entries:
        return "[the folder is empty]"
    text, left = _fitting(entries, limit)
    notes = []
    if left or len(entries) >= MAX_ENTRIES:
        notes.append(f"[{left} more; list a folder in it]" if left else f"[only the first {MAX_ENTRIES} are shown]")
    if b"ermission denied" in result.stderr:
        notes.append("[there are folders that you may not look into]")
    return "\n".join([text, *notes])


def _entry(line: str) -> str:
    kind, _, rest = line.partition("|")
    size, _, quoted = rest.partition("|")
    if not size.isdigit():
        return ""
    name = re.sub(r"""(['"])(?:\./)?(.*?)\1""", r"\2", quoted).removeprefix("./")
    if kind == "directory":
        return f"{name}/"
    if kind == "symbolic link":
        return name
    return f"{name}  {size} bytes" if kind.startswith("regular") else f"{name}  ({kind})"


def show_matches(result: CommandResult, limit: int) -> str:
    """Show what the script ``SEARCH`` printed."""
    lines = result.stdout.decode(errors="replace").splitlines()
    matches = [line.removeprefix("./")[:_MATCH_SHOWN] for line in lines if "\0" not in line]
    if not matches:
        return "[no line matches]"
    text, left = _fitting(matches, limit)
    if left or len(matches) >= MAX_MATCHES:
        more = f"{left} more lines match" if len(matches) < MAX_MATCHES else f"more than {MAX_MATCHES} lines match"
        return f"{text}\n[{more}; look for something narrower]"
    return text


def _fitting(lines: list[str], limit: int) -> tuple[str, int]:
    """Join as many lines as fit into so many bytes; return the text and how many are left out."""
    used = 0
    for number, line in enumerate(lines):
        used += len(line.encode(errors="replace")) + 1
        if used > limit and number:
            return "\n".join(lines[:number]), len(lines) - number
    return "\n".join(lines), 0
