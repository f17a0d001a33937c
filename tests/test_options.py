"""The command line as PHP, its libraries and cron write it: POSIX order, values skipped and never looked at."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enqueue import options
from enqueue.failure import USAGE, Failure

PROPERTY = settings(max_examples=200, derandomize=False, print_blob=True, deadline=None)

V = "www.v.example"


def call(*words: str) -> tuple[str | None, bool, list[str]]:
    """Sender, whether the header's recipients count, and the recipients of the arguments."""
    found = options.parse(list(words))
    assert found.vhost == V
    return found.sender, found.from_header, found.recipients


def status(*words: str) -> int:
    with pytest.raises(Failure) as failure:
        options.parse(list(words))
    return failure.value.status


# What is behind the vhost, and how it reads.
LINES: list[tuple[str, str | None, bool, str]] = [
    ("", None, True, ""),
    ("-t", None, True, ""),
    ("-t -i", None, True, ""),
    ("-ti", None, True, ""),
    ("-it", None, True, ""),
    ("-i", None, True, ""),
    ("-oi", None, True, ""),
    ("-o i", None, True, ""),
    # SENDER: last, or followed by an option.
    ("s@x", "s@x", True, ""),
    ("s@x -t -i", "s@x", True, ""),
    ("s@x -i r@x", "s@x", False, "r@x"),
    ("s@x -- r@x", "s@x", False, "r@x"),
    ("r1@x r2@x", None, False, "r1@x r2@x"),
    ("r1@x r2@x -t", None, False, "r1@x r2@x -t"),
    ("-t r@x", None, True, "r@x"),
    ("-i r@x", None, False, "r@x"),
    ("-- r@x", None, False, "r@x"),
    # -f and -r, joined and separate; the last one wins, and wins over SENDER.
    ("-fs@x", "s@x", True, ""),
    ("-f s@x", "s@x", True, ""),
    ("-rs@x", "s@x", True, ""),
    ("-r s@x", "s@x", True, ""),
    ("-fa@x -fb@x", "b@x", True, ""),
    ("-fa@x -rb@x", "b@x", True, ""),
    ("-r a@x -f b@x", "b@x", True, ""),
    ("s@x -t -i -fa@x", "a@x", True, ""),
    ("s@x -t -f a@x r@x", "a@x", True, "r@x"),
    ("-tifs@x", "s@x", True, ""),
    ("-tif s@x r@x", "s@x", True, "r@x"),
    ("-f -t r@x", "-t", False, "r@x"),
    ("-f -- r@x", "--", False, "r@x"),
    # Recipients and -t: both count.
    ("-t a@x b@x", None, True, "a@x b@x"),
    ("-i a@x b@x", None, False, "a@x b@x"),
    # No permutation: behind the first other word everything is a recipient.
    ("-t a@x -f late@x", None, True, "a@x -f late@x"),
    ("-i a@x -t", None, False, "a@x -t"),
    ("-i a@x -- b@x", None, False, "a@x -- b@x"),
    ("-i -- -t", None, False, "-t"),
    ("-t -- -fa@x b@x", None, True, "-fa@x b@x"),
    ("-i --", None, True, ""),
    ("-i -", None, False, "-"),
    ("a@x -", None, False, "a@x -"),
    # Values that are skipped.
    ("-O QueueDirectory=/tmp r@x", None, False, "r@x"),
    ("-OQueueDirectory=/tmp r@x", None, False, "r@x"),
    ("-OQueueDirectory=/tmp -X/var/www/x.php -t", None, True, ""),
    ("-X /tmp/log r@x", None, False, "r@x"),
    ("-X/tmp/log r@x", None, False, "r@x"),
    ("-C /tmp/main.cf r@x", None, False, "r@x"),
    ("-C/tmp/main.cf -fs@x -t", "s@x", True, ""),
    ("-oQ/tmp -odb -odi -oem -oee -om -o7 -o8 -t", None, True, ""),
    ("-N never r@x", None, False, "r@x"),
    ("-Nsuccess,failure r@x", None, False, "r@x"),
    ("-R hdrs -V id r@x", None, False, "r@x"),
    ("-B8BITMIME r@x", None, False, "r@x"),
    ("-B 8BITMIME r@x", None, False, "r@x"),
    ("-L tag -p esmtp -h 5 -e m r@x", None, False, "r@x"),
    ("-Am -Ac r@x", None, False, "r@x"),
    ("-F name r@x", None, False, "r@x"),
    ("-Fname r@x", None, False, "r@x"),
    ("-n -v -m -U -G -c -x r@x", None, False, "r@x"),
    ("-nv -t", None, True, ""),
    ("-bm r@x", None, False, "r@x"),
    ("-b m r@x", None, False, "r@x"),
    ("-tbm", None, True, ""),
]


@pytest.mark.parametrize(("line", "sender", "from_header", "recipients"), LINES)
def test_line(line: str, sender: str | None, from_header: bool, recipients: str) -> None:
    """Each line reads as Postfix's sendmail reads it behind its own name."""
    assert call(V, *line.split()) == (sender, from_header, recipients.split())


# What real callers run, word by word; the administrator's part is the vhost, and what stands in sendmail_path.
CALLERS: list[tuple[str, list[str], str | None, bool, list[str]]] = [
    ("the line of 2006", [V, "user@v.example"], "user@v.example", True, []),
    ("the original without a user", [V], None, True, []),
    ("PHP", [V, "user@v.example", "-t", "-i"], "user@v.example", True, []),
    ("PHP, fifth argument", [V, "user@v.example", "-t", "-i", "-ffrom@v.example"], "from@v.example", True, []),
    ("PHP, recipient as fifth argument", [V, "-t", "-i", "ceo@bank.example"], None, True, ["ceo@bank.example"]),
    ("PHPMailer 6.6", [V, "-t", "-i", "-oi", "-ffrom@x", "-t"], "from@x", True, []),
    ("PHPMailer", [V, "s@x", "-t", "-i", "-ffrom@x", "-i", "-t"], "from@x", True, []),
    ("Symfony", [V, "-i", "-ffrom@x", "r1@x", "r2@x"], "from@x", False, ["r1@x", "r2@x"]),
    ("Symfony, with a user", [V, "user@v.example", "-i", "-ffrom@x", "r1@x"], "from@x", False, ["r1@x"]),
    ("Drupal", [V, "-t", "-i", "-fReturn@x"], "Return@x", True, []),
    ("nodemailer", ["-i", "-f", "from@x", V, "r1@x", "r2@x"], "from@x", False, ["r1@x", "r2@x"]),
    ("nodemailer, with args", [V, "-i", "-f", "from@x", "r1@x", "r2@x"], "from@x", False, ["r1@x", "r2@x"]),
    ("git", [V, "-i", "r1@x", "r2@x"], None, False, ["r1@x", "r2@x"]),
    ("git, with a sender", [V, "-f", "s@x", "-i", "r1@x", "r2@x"], "s@x", False, ["r1@x", "r2@x"]),
    ("Debian cron", [V, "-FCronDaemon", "-i", "-B8BITMIME", "-oem", "root"], None, False, ["root"]),
    ("cronie", [V, "-FCronDaemon", "-i", "-odi", "-oem", "-oi", "-t", "-f", "root"], "root", True, []),
    ("PEAR Mail", [V, "-i", "-ffrom@x", "--", "r1@x", "r2@x"], "from@x", False, ["r1@x", "r2@x"]),
    ("logwatch", [V, "-t"], None, True, []),
    ("busybox", [V, "-ti"], None, True, []),
    ("mailx", [V, "-r", "s@x", "r1@x"], "s@x", False, ["r1@x"]),
    ("an attack on PHPMailer", [V, "-t", "-i", "-fa", "-OQueueDirectory=/tmp", "-X/var/www/x.php", "b@x"], "a", True, ["b@x"]),
    ("an empty recipient", [V, "-i", ""], None, False, [""]),
    ("an empty sender", [V, "-f", "", "-t"], "", True, []),
    ("an empty SENDER", [V, "", "-t"], "", True, []),
    ("the null sender", [V, "-f", "<>", "-t"], "<>", True, []),
]


@pytest.mark.parametrize(
    ("words", "sender", "from_header", "recipients"), [row[1:] for row in CALLERS], ids=[r[0] for r in CALLERS]
)
def test_caller(words: list[str], sender: str | None, from_header: bool, recipients: list[str]) -> None:
    """Real callers' words name the sender and the recipients that they mean."""
    assert call(*words) == (sender, from_header, recipients)


@pytest.mark.parametrize("word", ["-i", "-t", "-fa@x", "-oi", "-bm"])
def test_no_sender_where_an_option_precedes_the_vhost(word: str) -> None:
    """With an option before the vhost, the word behind it is a recipient: SENDER must not swallow one."""
    assert call(word, V, "r@x")[2] == ["r@x"]
    assert call(word, V, "r@x", "-t")[2] == ["r@x", "-t"]


@pytest.mark.parametrize(
    ("words", "name"), [(["-F", "A B"], "A B"), (["-FCronDaemon"], "CronDaemon"), (["-Fa", "-Fb"], "b"), ([], "")]
)
def test_full_name(words: list[str], name: str) -> None:
    """-F gives the full name, joined or separate, the last one wins."""
    assert options.parse([V, *words, "-t"]).full_name == name


def test_spool_is_an_option_only_as_the_first_word() -> None:
    """--spool counts as the very first argument, and nowhere else."""
    assert options.parse([V]).spool == "/var/spool/php-secure-sendmail"
    assert options.parse(["--spool", "/srv/spool", V, "-t"]).spool == "/srv/spool"
    assert options.parse(["--spool", "-t", V]).spool == "-t"
    assert options.parse([V, "-t", "r@x", "--spool", "/tmp"]).recipients == ["r@x", "--spool", "/tmp"]
    for words in ([V, "--spool", "/tmp"], ["-i", "--spool", "/tmp", V], [V, "s@x", "--spool", "/tmp", "-t"]):
        assert status(*words) == USAGE


def test_sender_behind_spool() -> None:
    """--spool is no option before the vhost: the word behind the vhost is still SENDER."""
    assert call("--spool", "/srv/spool", V, "s@x", "-t", "-i") == ("s@x", True, [])


REFUSED = [
    "-bp", "-bi", "-bd", "-bl", "-bt", "-bv", "-bh", "-bH", "-ba", "-b", "-bz", "-b p", "-I", "-q", "-q10m", "-qf", "-tq",
    "-Z", "-tZ", "-1", "-tiZ", "--foo", "--foo=bar", "--help", "--spool=/tmp", "-f", "-r", "-F", "-X", "-C", "-O", "-o", "-N",
    "-R", "-V", "-tf", "-t -f", "-A", "-B", "-L", "-ü",
]  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line: str) -> None:
    """Modes that are not offered, unknown options and missing values are 64: nothing is answered with 0 unread."""
    assert status(V, *line.split()) == 64
    assert status(V, "-i", *line.split()) == 64


@pytest.mark.parametrize("words", [["-bs"], ["-bs", "-i"], ["-b", "s"], ["-tbs"]])
def test_smtp_mode_is_answered(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """-bs is 64, and its caller, who waits for a banner, gets a 421."""
    assert status(V, *words) == 64
    answer = capfd.readouterr().out
    assert answer.startswith("421 ") and answer.endswith("\r\n") and answer.count("\n") == 1


NO_VHOST = [[], ["--spool"], ["--spool", ""], ["--spool", "/tmp"], ["-t"], ["-t", "-i"], ["-f", V], ["--"]]


@pytest.mark.parametrize("words", NO_VHOST)
def test_no_vhost(words: list[str]) -> None:
    """Without a vhost, or a directory for --spool, it is 64."""
    assert status(*words) == 64


VHOSTS = [
    ("www.example.com", "www.example.com"),
    ("WWW.Example.COM", "www.example.com"),
    ("localhost", "localhost"),
    ("a", "a"),
    ("1.2.3.4", "1.2.3.4"),
    ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ("a-b.c--d", "a-b.c--d"),
    ("a" * 63 + ".b", "a" * 63 + ".b"),
    (".".join(["a" * 49] * 5 + ["abc"]), ".".join(["a" * 49] * 5 + ["abc"])),
]


@pytest.mark.parametrize(("word", "name"), VHOSTS)
def test_good_vhost(word: str, name: str) -> None:
    """A vhost is a host name, read in lower case."""
    assert options.parse([word, "-t"]).vhost == name


BAD_VHOSTS = [
    "", ".", "..", "../../tmp", "a/b", "/", "a..b", ".a", "a.", "www.v.tld.", "-a", "a-", "a.-b", "a b", " a", "a\nX: y", "a\n",
    "a\0", "a\tb", "a_b", "*", "*.example.com", "user@v.example", "bücher.example", "\u212a.example", "a%b", "a:b", "[::1]",
    "\udcff",
    "a" * 64, "a" * 300, ".".join(["a" * 49] * 5 + ["abcd"]),
]  # fmt: skip


@pytest.mark.parametrize("word", BAD_VHOSTS)
def test_bad_vhost(word: str) -> None:
    """What is no host name in ASCII (RFC 1123, 253 characters) is 64, and reaches no path."""
    if word.startswith("-"):
        assert status("--", word, "-t") == 64
    else:
        assert status(word, "-t") == 64


def test_no_option_opens_a_path(tmp_path: Path) -> None:
    """Flags that name files elsewhere neither make nor read one."""
    words = ["-X", "log", "-C", "cf", "-OQueueDirectory=queue", "-oQqueue", "-oXlog"]
    words = [word if word.startswith("-") else str(tmp_path / word) for word in words]
    assert call(V, *words, "-t") == (None, True, [])
    assert list(tmp_path.iterdir()) == []


WORDS = st.lists(
    st.one_of(
        st.sampled_from(
            [V, "-t", "-i", "-ti", "-f", "-fa@x", "-r", "-F", "-o", "-oi", "--", "-", "", "-bm", "-bp", "-q", "a@x", "-X"]
        ),
        st.text(max_size=8),
    ),
    max_size=8,
)


@PROPERTY
@given(WORDS)
def test_nothing_but_usage(words: list[str]) -> None:
    """Whatever the words are, they are read or refused with 64; nothing else is raised."""
    try:
        found = options.parse(list(words))
    except Failure as failure:
        assert failure.status == USAGE
        return
    assert found.from_header or found.recipients


@PROPERTY
@given(st.lists(st.text("a@.-tif ", max_size=5), max_size=6))
def test_recipients_are_the_rest(words: list[str]) -> None:
    """Behind `--` every word is a recipient, whatever it looks like."""
    assert call(V, "-i", "--", *words) == (None, not words, words)
