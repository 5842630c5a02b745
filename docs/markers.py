"""Text between two markers of a page, which a script writes; the rest is written by hand."""


def between(page: str, begin: str, end: str, text: str) -> str:
    """A page with what stands between two of its markers renewed.

    Args:
        page: its text.
        begin, end: the markers; they stay.
        text: comes right between them.

    Raises:
        SystemExit: the page does not have both.
    """
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"the page has lost the markers {begin} and {end}")
    return f"{before}{begin}{text}{end}{after}"
