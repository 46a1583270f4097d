"""cluster.env, which a shell sources as root: nothing that is accepted may mean more to it than its text.

The judge of what a shell makes of a line is a real bash.
"""

import random
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from vmmesh_agent import clusterenv

MARKER = "marker"


def sourced_by_bash(content: bytes, folder: Path) -> dict[str, str]:
    """Return what the sidecar's start script would export after sourcing the file, where every word is a file."""
    file = folder / "cluster.env"
    file.write_bytes(content)
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", "set -a; . ./cluster.env; env -0"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "VMMESH": "1"},
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert done.stderr == b""
    exported = dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)
    return {name: value for name, value in exported.items() if name not in {"PATH", "VMMESH", "PWD", "SHLVL", "_"}}


def parsed(text: str) -> dict[str, str]:
    variables, problems = clusterenv.parse(text)
    assert problems == []
    return variables


def problems_of(text: str) -> list[str]:
    return clusterenv.parse(text)[1]


# --- round trips ---

ALPHABET = "'\"\\$`!#&;|<>(){}[]*?~ \t=%@:,./-_ aZ09éß東✓\u00a0\u2028\u0085"


def some_values(seed: int, number: int) -> dict[str, str]:
    """Return values of all lengths in which what a shell minds is frequent."""
    chance = random.Random(seed)  # noqa: S311  # the same values every time
    return {
        f"V{n}": "".join(chance.choices(ALPHABET, k=chance.randrange(30))).replace("\t", " ") for n in range(number)
    }


def test_what_is_rendered_is_parsed_as_it_was() -> None:
    for seed in range(40):
        variables = some_values(seed, 100)
        text = clusterenv.render(variables)
        assert clusterenv.parse(text) == (variables, [])
        assert clusterenv.render(parsed(text)) == text


def test_what_is_rendered_is_read_by_bash_as_exactly_that(tmp_path: Path) -> None:
    for seed in range(5):
        variables = some_values(seed, 300)
        assert sourced_by_bash(clusterenv.render(variables).encode(), tmp_path) == variables
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.env"]


def test_rendering_sorts_and_ends_with_a_newline() -> None:
    assert clusterenv.render({"B": "", "A_B": "1", "AB": "it's"}) == """AB='it'"'"'s'\nA_B='1'\nB=''\n"""
    assert clusterenv.render({}) == ""


# --- what a shell would take in different ways ---

COMMANDS = [
    f"touch {MARKER}",
    f"/usr/bin/touch {MARKER}",
    f"$(touch {MARKER})",
    f"`touch {MARKER}`",
    f"a[$(touch {MARKER})]",
    f"<(touch {MARKER})",
    f"$((a[$(touch {MARKER})]))",
    f"${{x:-$(touch {MARKER})}}",
    f"() {{ :; }}; touch {MARKER}",
    f"$'\\x24(touch {MARKER})'",
]
LINES = [
    "X={command}",
    "X='{command}'",
    'X="{command}"',
    "X=''{command}",
    "X='{command}",
    'X="{command}',
    "X='' {command}",
    "X='';{command}",
    "X=''\n{command}",
    "X=''\\\n{command}",
    "X=''\r\n{command}",
    "X='\n{command}'",
    "X='a'#'{command}'",
    "X=a {command}",
    "X=a&{command}",
    "X=a|{command}",
    "X=a>{command}",
    "X[{command}]=a",
    "X+=a{command}",
    "X=({command})",
    "X=a\x0b{command}",
    "X=a\x0c{command}",
    "X=a\u2028{command}",
    "X=a\u0085{command}",
    "X=a\u00a0{command}",
    "X=a\x00{command}",
    "export X={command}",
    "declare -i X={command}",
    "readonly X={command}",
    "{command}",
    "{command}=1",
    "#\n{command}",
    "#\\\n{command}",
    "# comment\r{command}",
    "# comment\u2028{command}",
    "# comment\u0085{command}",
    "X=1 Y={command}",
    "X=~/{command}",
    "X=a:~:{command}",
    "X={{a,b}}{command}",
    "X=$HOME{command}",
    'X="\\\\"{command}""',
    'X="\\"{command}\\""',
    "X=!!{command}",
    "X=a'b'\"c\"'{command}'",
    " \t X={command}",
    "X ={command}",
    "X= {command}",
    "\ufeffX={command}",
    "=X{command}",
]
SPECIAL = """
    _ BASH BASHOPTS BASHPID BASH_ALIASES BASH_ARGC BASH_ARGV BASH_CMDS BASH_COMMAND BASH_ENV BASH_SUBSHELL
    BASH_VERSINFO BASH_XTRACEFD CDPATH COLUMNS COMP_CWORD COMP_WORDBREAKS COMPREPLY COPROC DIRSTACK ENV EPOCHREALTIME
    EPOCHSECONDS EUID EXECIGNORE FIGNORE FUNCNAME FUNCNEST GLOBIGNORE GROUPS HISTCMD HISTCONTROL HISTFILE HISTSIZE
    HOME HOSTFILE IFS IGNOREEOF INPUTRC LANG LC_ALL LD_LIBRARY_PATH LD_PRELOAD LINENO LINES MAILCHECK MAPFILE OLDPWD
    OPTARG OPTERR OPTIND PATH PIPESTATUS POSIXLY_CORRECT PPID PROMPT_COMMAND PS1 PS4 PWD RANDOM READLINE_LINE
    READLINE_POINT REPLY SECONDS SHELL SHELLOPTS SHLVL SRANDOM TERM TIMEFORMAT TMOUT TMPDIR UID auto_resume histchars
""".split()
HOSTILE = [line.format(command=command) for line in LINES for command in COMMANDS] + [
    f"{name}='{value}'" for name in SPECIAL for value in ("a[$(touch marker)]", "1", "/tmp/x")
]


def test_nothing_hostile_that_is_accepted_means_more_to_bash_than_its_text(tmp_path: Path) -> None:
    accepted: list[dict[str, str]] = []
    for line in HOSTILE:
        variables, problems = clusterenv.parse(line + "\n")
        assert variables or problems or line.startswith("#") or not line.strip()
        if not problems:
            accepted.append(variables)
    assert len(accepted) > 10  # the plain quoted ones: the corpus reaches what it is to test
    # One bash for all: each case gets names of its own, so that none hides another.
    together: dict[str, str] = {}
    for number, variables in enumerate(accepted):
        together |= {(f"{name}_{number}" if name == "X" else name): value for name, value in variables.items()}
    assert sourced_by_bash(clusterenv.render(together).encode(), tmp_path) == together
    assert not (tmp_path / MARKER).exists()


def test_the_corpus_is_dangerous_to_whoever_sources_it_unread(tmp_path: Path) -> None:
    (tmp_path / "cluster.env").write_text("SRANDOM='a[$(touch marker)]'\n")
    subprocess.run(["bash", "-c", ". ./cluster.env"], cwd=tmp_path, capture_output=True, timeout=20, check=False)
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", SPECIAL)
def test_a_variable_that_belongs_to_the_shell_or_the_loader_is_refused(name: str) -> None:
    for spelling in {name, name.lower(), name.upper()}:
        assert problems_of(f"{spelling}='1'\n"), spelling


@pytest.mark.parametrize(
    "name",
    """
    BASH_FUNC_touch LD_AUDIT GCONV_PATH GLIBC_TUNABLES GODEBUG SSL_CERT_FILE HTTPS_PROXY https_proxy PYTHONPATH PERL5LIB
    SUDO_EDITOR XTABLES_LIBDIR NOTIFY_SOCKET ISTIO_BIN_BASE ISTIO_AGENT_FLAGS ISTIO_LOG_DIR ISTIO_CUSTOM_IP_TABLES
    ISTIO_CLUSTER_CONFIG ISTIO_SIDECAR_CONFIG EXEC_USER ENVOY_USER INSTANCE_IP
    """.split(),
)
def test_a_variable_that_steers_the_start_as_root_is_refused(name: str) -> None:
    (problem,) = problems_of(f"{name}='1'\n")
    assert problem.startswith(f"line 1: {name} ")


def test_what_bash_itself_sets_aside_is_refused() -> None:
    """Ask the shell of this machine for all its own names, so that a newer one is tested with what it brings."""
    asked = subprocess.run(
        ["bash", "--norc", "-c", "compgen -v"], capture_output=True, text=True, env={}, timeout=20, check=True
    )
    names = asked.stdout.split()
    assert "PPID" in names
    assert [name for name in names if not problems_of(f"{name}='1'\n")] == []


# --- single rules ---


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("X=''", ""),
        ("X=", ""),
        ("X=plain", "plain"),
        ("X=*", "*"),
        ("X=a,b:c/d-e", "a,b:c/d-e"),
        ('X="two words"', "two words"),
        ("X='it'\"'\"'s'", "it's"),
        ("X='a'b\"c\"", "abc"),
        ('X=\'{"app":"demo"}\'', '{"app":"demo"}'),
        ("  X='indented'  ", "indented"),
        ("X='a=b'", "a=b"),
        ("X=a=b", "a=b"),
        ("X='#'", "#"),
        ("X='a'\r", "a"),
    ],
)
def test_a_line_is_read_as_a_shell_reads_it(line: str, value: str, tmp_path: Path) -> None:
    assert parsed(line + "\n") == {"X": value}
    if not line.endswith("\r"):
        assert sourced_by_bash(line.encode() + b"\n", tmp_path) == {"X": value}


@pytest.mark.parametrize(
    "line",
    [
        "X",
        "X='open",
        'X="open',
        "X=a b",
        "X=$HOME",
        'X="$HOME"',
        "X=`id`",
        "X=a\\b",
        "X=~",
        "X=a;b",
        "export X=a",
        "1X='a'",
        "X-Y='a'",
        "X.Y='a'",
        "Ö='a'",
        "X='a\tb'",
        "X='\x1b[2J'",
        "X='\x7f'",
        "X+='a'",
        "X[0]='a'",
    ],
)
def test_a_line_that_is_not_plain_text_in_quotes_is_refused(line: str) -> None:
    variables, problems = clusterenv.parse(f"A='1'\n{line}\nB='2'\n")
    assert variables == {"A": "1", "B": "2"}
    assert len(problems) == 1
    assert problems[0].startswith("line 2: ")
    assert problems[0].isprintable()


def test_a_variable_that_is_set_twice_is_refused() -> None:
    assert problems_of("X='1'\nX='2'\n") == ["line 2: X is set twice"]


def test_comments_and_blank_lines_say_nothing() -> None:
    assert clusterenv.parse("\n# X='1'\n\t# Y\n  \nZ='1'") == ({"Z": "1"}, [])


VALUES: Mapping[str, tuple[list[str], list[str]]] = {
    "CA_ADDR": (
        ["", "istiod-1-28.istio-system.svc:15012", "192.0.2.1:15012", "[2001:db8::1]:15012"],
        ["istiod", "istiod:0", "istiod:1,2", "a b:1", "istiod:15012 --flag", "-x:1"],
    ),
    "ISTIO_INBOUND_INTERCEPTION_MODE": (["", "REDIRECT", "NONE"], ["TPROXY", "redirect", "REDIRECT "]),
    "ISTIO_INBOUND_PORTS": (["", "*", "80", "80,443"], ["0", "65536", "80,", "80 443", "-p", "*,80", "٣"]),
    "ISTIO_LOCAL_EXCLUDE_PORTS": (["", "22,15090"], ["*", "http", "22;id"]),
    "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE": (["", "22"], ["*", "a"]),
    "ISTIO_META_DNS_CAPTURE": (["", "true", "false"], ["yes", "TRUE", "1"]),
    "ISTIO_NAMESPACE": (["vm", "a-1"], ["", "VM", "a.b", "-a", "x" * 64, "a b"]),
    "ISTIO_OUTBOUND_PORTS": (["", "*", "80"], ["a"]),
    "ISTIO_SERVICE": (["", "demo.vm"], ["demo vm", "$x", "-demo"]),
    "ISTIO_SERVICE_CIDR": (["", "*", "10.0.0.0/8", "10.0.0.0/8,::/0"], ["10.0.0.0/99", "all", "10.0.0.0/8 -j"]),
    "ISTIO_SERVICE_EXCLUDE_CIDR": (["", "169.254.169.254/32"], ["nowhere"]),
    "ISTIO_SVC_IP": (["", "10.1.2.3", "2001:db8::1"], ["10.1.2", "10.1.2.3 id", "eth0", "fe80::1%eth0;id"]),
    "ISTIO_SYSTEM_NAMESPACE": (["", "istio-system"], ["a b"]),
    "OUTPUT_CERTS": (["/etc/certs"], ["", "/tmp", "/etc/certs/../shadow"]),
    "POD_NAME": (["", "vm-1.example.com"], ["a b", "-a", "A;id"]),
    "POD_NAMESPACE": (["vm"], ["", "VM", "a b"]),
    "PROV_CERT": (["/etc/certs"], ["", "/tmp"]),
    "SERVICE_ACCOUNT": (["vm", "a.b"], ["", "a b", "-a"]),
    "TRUST_DOMAIN": (["", "cluster.local", "td_1"], ["a b", "spiffe://x", "$(id)"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_the_start_script_splices_into_a_command_line_is_of_its_kind(name: str) -> None:
    right, wrong = VALUES[name]
    for value in right:
        assert parsed(clusterenv.render({name: value})) == {name: value}
    for value in wrong:
        (problem,) = problems_of(clusterenv.render({name: value}))
        assert problem.startswith(f"line 1: {name} must be "), value
