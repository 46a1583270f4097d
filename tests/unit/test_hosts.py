"""The bundle's hosts lines, and the agent's block in somebody else's /etc/hosts."""

import random

import pytest

from vmmesh_agent.hosts import BEGIN, END, HostsLine, parse, with_block

ISTIOD = (HostsLine("192.0.2.1", ("istiod.istio-system.svc",)),)
OTHER = (HostsLine("2001:db8::2", ("istiod.istio-system.svc", "istiod.istio-system.svc.cluster.local")),)
BLOCK = b"# BEGIN vmmesh-agent\n192.0.2.1 istiod.istio-system.svc\n# END vmmesh-agent\n"

THEIRS = {
    "nothing": b"",
    "a usual file": b"127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
    "no newline at the end": b"127.0.0.1 localhost",
    "CRLF": b"127.0.0.1 localhost\r\n\r\n# printer\r\n10.0.0.9 printer\r\n",
    "not UTF-8": b"10.0.0.9 drucker # B\xfcro\n\xff\xfe\n",
    "blank lines": b"\n\n\n127.0.0.1 localhost\n\n",
    "tabs and comments": b"\t# a\n127.0.0.1\tlocalhost\t# b\n",
    "old Mac": b"127.0.0.1 localhost\r10.0.0.9 printer\r",
    "other markers": b"# BEGIN vmmesh-agent-2\n# BEGIN ANSIBLE\n10.0.0.1 a\n# END ANSIBLE\n#BEGIN vmmesh-agent\n",
    "an istiod of theirs": b"192.0.2.9 istiod.istio-system.svc\n",
    "NUL": b"\x00\n127.0.0.1 localhost\n",
}


@pytest.mark.parametrize("theirs", THEIRS.values(), ids=list(THEIRS))
def test_what_is_somebody_elses_stays_byte_for_byte(theirs: bytes) -> None:
    assert with_block(theirs, ()) == theirs
    joined = with_block(theirs, ISTIOD)
    assert joined in {theirs + BLOCK, theirs + b"\n" + BLOCK}
    assert with_block(joined, ()) in {theirs, theirs + b"\n"}


@pytest.mark.parametrize("theirs", THEIRS.values(), ids=list(THEIRS))
def test_a_second_time_changes_nothing(theirs: bytes) -> None:
    joined = with_block(theirs, ISTIOD)
    assert with_block(joined, ISTIOD) == joined
    assert with_block(with_block(joined, OTHER), ISTIOD) == joined


def test_the_block_stays_where_it_is() -> None:
    before, after = b"127.0.0.1 localhost\n", b"10.0.0.9 printer"
    changed = with_block(before + BLOCK + after, OTHER)
    assert changed.startswith(before + BEGIN + b"\n2001:db8::2 ")
    assert changed.endswith(END + b"\n" + after)
    assert with_block(before + BLOCK + after, ()) == before + after


def test_a_block_that_an_editor_gave_crlf_is_known_again() -> None:
    assert with_block(BLOCK.replace(b"\n", b"\r\n"), ISTIOD) == BLOCK


def test_a_block_at_the_end_without_a_newline_is_known_again() -> None:
    assert with_block(b"127.0.0.1 localhost\n" + BLOCK.rstrip(), ISTIOD) == b"127.0.0.1 localhost\n" + BLOCK


LONE = {
    "a lone beginning": (b"a\n# BEGIN vmmesh-agent\n10.0.0.9 printer\n", b"a\n10.0.0.9 printer\n"),
    "a lone end": (b"a\n# END vmmesh-agent\n10.0.0.9 printer\n", b"a\n10.0.0.9 printer\n"),
    "the wrong way round": (b"# END vmmesh-agent\n10.0.0.9 printer\n# BEGIN vmmesh-agent\n", b"10.0.0.9 printer\n"),
    "a beginning before a block": (b"# BEGIN vmmesh-agent\n10.0.0.9 printer\n" + BLOCK, b"10.0.0.9 printer\n"),
    "two blocks": (BLOCK + b"10.0.0.9 printer\n" + BLOCK, b"10.0.0.9 printer\n"),
    "an end after a block": (BLOCK + b"10.0.0.9 printer\n# END vmmesh-agent\n", b"10.0.0.9 printer\n"),
}


@pytest.mark.parametrize(("content", "theirs"), LONE.values(), ids=list(LONE))
def test_a_marker_without_its_partner_takes_no_line_of_theirs_with_it(content: bytes, theirs: bytes) -> None:
    assert with_block(content, ()) == theirs
    joined = with_block(content, ISTIOD)
    assert joined.count(BEGIN) == joined.count(END) == 1
    assert joined.replace(BLOCK, b"") == theirs


def test_whatever_the_file_holds_one_block_comes_of_it_and_stays() -> None:
    chance = random.Random(7)  # noqa: S311  # the same values every time
    pieces = [BEGIN, END, b"\n", b"\n", b"\r\n", b"10.0.0.9 printer", b"\xff", b" ", BLOCK]
    for _ in range(2000):
        content = b"".join(chance.choices(pieces, k=chance.randrange(12)))
        joined = with_block(content, ISTIOD)
        assert with_block(joined, ISTIOD) == joined
        assert BLOCK in joined
        # The line of theirs that was within a whole block is ours to drop; one outside is not.
        assert joined.count(b"printer") == with_block(content, ()).count(b"printer")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ()),
        ("# nothing\n\n", ()),
        ("192.0.2.1 istiod.istio-system.svc\n", ISTIOD),
        ("\t192.0.2.1\tISTIOD.istio-system.svc.  # gateway\r\n", ISTIOD),
        ("2001:0db8::0002 istiod.istio-system.svc istiod.istio-system.svc.cluster.local", OTHER),
        ("127.0.0.1 istiod.istio-system.svc", (HostsLine("127.0.0.1", ("istiod.istio-system.svc",)),)),
    ],
)
def test_the_lines_of_a_bundle_are_read(text: str, lines: tuple[HostsLine, ...]) -> None:
    assert parse(text) == (lines, [])


@pytest.mark.parametrize(
    "line",
    [
        "istiod.istio-system.svc",
        "192.0.2.1",
        "192.0.2 istiod",
        "192.0.2.256 istiod",
        "0.0.0.0 istiod",
        ":: istiod",
        "224.0.0.1 istiod",
        "ff02::1 istiod",
        "fe80::1 istiod",
        "fe80::1%eth0 istiod",
        "2001:db8::1%\x1b[2J istiod",
        "192.0.2.1 istiod..svc",
        "192.0.2.1 -istiod",
        "192.0.2.1 istiöd",
        "192.0.2.1 istiod\x1b[2J",
        "192.0.2.1 istiod,evil",
        f"192.0.2.1 {'a' * 64}.svc",
        f"192.0.2.1 {'a.' * 127}svc",
    ],
)
def test_a_line_that_names_no_machine_is_refused(line: str) -> None:
    lines, problems = parse(f"192.0.2.1 istiod.istio-system.svc\n{line}\n")
    assert lines == ISTIOD
    assert len(problems) == 1
    assert problems[0].startswith("line 2: ")
    assert problems[0].isprintable()
