"""make run: the whole way once, on the embedded default, everything under ./var; no root, no server.

Starts the releaser with a maildir as the MTA, sends mail of two vhosts through the real enqueue command (through PHP's
mail() where php is there), one of them over its limit, and shows what became of it. Stays up until Ctrl-C; with --once
it ends, with status 0 only if all was as it should be.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BIN = HERE / ".venv/bin"
VAR = HERE / "var"
CONFIG = VAR / "etc/releaser.toml"
SHOP, BLOG = "shop.example", "blog.example"
SENT = {SHOP: 5, BLOG: 2}
LIMIT = 3
PATIENCE = 30


def main() -> int:
    once = sys.argv[1:] == ["--once"]
    prepare()
    for vhost in SENT:
        if not (VAR / "spool/vhosts" / vhost).exists():
            subprocess.run([*command(), "vhost", "add", vhost], check=True, stdout=subprocess.DEVNULL)
    with (VAR / "releaser.log").open("a") as log:
        releaser = subprocess.Popen([BIN / "secure-sendmail-releaser", "--config", CONFIG], stderr=log)
    try:
        before = json_of("status")
        for vhost, count in SENT.items():
            for number in range(1, count + 1):
                how = send(vhost, number)
        print(f"sent {SENT[SHOP]} mails of {SHOP}, whose limit is {LIMIT} an hour, and {SENT[BLOG]} of {BLOG}, {how}\n")
        good = show(before)
        if not once:
            print("\nThe releaser stays up; Ctrl-C ends it.")
            signal.pause()
    except KeyboardInterrupt:
        good = True
    finally:
        releaser.terminate()
        ended = releaser.wait()
    return 0 if good and ended == 0 else 1


def prepare() -> None:
    """A fresh ./var, unless one is there whose mail someone may want to review."""
    if VAR.exists() and "--once" in sys.argv:
        shutil.rmtree(VAR)
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    CONFIG.parent.chmod(0o700)
    # Ours, also where root runs this on a host that has the user secure-sendmail: private mode.
    (VAR / "state").mkdir(mode=0o700, exist_ok=True)
    CONFIG.write_text(
        f"""# Made by make run.
spool = "{VAR}/spool"
state = "{VAR}/state"

[mta]
url = "maildir:{VAR}/mail"

[vhosts."{SHOP}"]
limits = ["{LIMIT}/1h"]
"""
    )


def send(vhost: str, number: int) -> str:
    """Send one mail, as PHP does; say how."""
    enqueue = shlex.join(
        [str(BIN / "secure-sendmail-enqueue"), "--spool", f"{VAR}/spool", vhost, f"webmaster@{vhost}", "-t", "-i"]
    )
    subject = f"Order {number}" if vhost == SHOP else f"Comment {number}"
    php = shutil.which("php")
    if php:
        script = f'exit(mail("someone@customer.example", "{subject}", "Thank you.\\n", "From: webmaster@{vhost}") ? 0 : 1);'
        subprocess.run([php, "-d", f"sendmail_path={enqueue}", "-d", "mail.add_x_header=On", "-r", script], check=True)
        return "through PHP's mail()"
    message = f"To: someone@customer.example\nSubject: {subject}\nFrom: webmaster@{vhost}\n\nThank you.\n"
    subprocess.run(["/bin/sh", "-c", enqueue], input=message.encode(), check=True)
    return "through the enqueue command (php is not installed)"


def show(before: dict[str, Any]) -> bool:
    """Print what went out and what is held; say whether it is what the limit demands."""
    expected = sum(SENT.values())
    deadline = time.monotonic() + PATIENCE
    while True:
        status = json_of("status")
        rows = [row for row in json_of("log") if row["event"] in ("released", "held")]
        settled = status["queued"] == status["active"] == 0 and len(rows) >= expected
        if settled or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    subprocess.run([*command(), "log", "--last", str(expected)], check=True)
    delivered = sorted((VAR / "mail/new").glob("*"))
    print(f"\nWent out, to {VAR}/mail/new: {len(delivered)} files, the last one:\n")
    print("".join(f"    {line}\n" for line in delivered[-1].read_text().splitlines()) if delivered else "    none")
    print("Held for review:\n", flush=True)
    subprocess.run([*command(), "hold", "list"], check=True)
    held = json_of("hold", "list")
    tool = shlex.join(map(str, command()))
    if held:
        print(f"\nReview it with:\n  {tool} hold show {held[0]['queue_id']}\n  {tool} hold release {held[0]['queue_id']}")
        print(f"  {tool} hold delete --vhost {SHOP} --why spam\n  {tool} status")
    used = next(vhost["windows"][0]["used"] for vhost in before["vhosts"] if vhost["name"] == SHOP) if before else 0
    over = SENT[SHOP] - max(LIMIT - used, 0)
    tagged = all(
        path.read_bytes().count(b"\nX-Domain: ") + path.read_bytes().startswith(b"X-Domain: ") == 1 for path in delivered
    )
    good = settled and status["held"] - (before["held"] if before else 0) == over and tagged and bool(delivered)
    if not good:
        print(f"\nNot as it should be; see {VAR}/releaser.log", file=sys.stderr)
    return good


def command() -> list[str | os.PathLike[str]]:
    return [BIN / "secure-sendmail", "--config", CONFIG]


def json_of(*words: str) -> Any:
    """What a listing prints with --json."""
    run = subprocess.run([*command(), *words, "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(run.stdout)


if __name__ == "__main__":
    sys.exit(main())
