"""Real programs that send mail -> enqueue -> releaser -> smtp-sink, each set up with the line of calling.md's table."""

from __future__ import annotations

import email
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from socket import AF_UNIX, SOCK_DGRAM, socket
from typing import Any

import page
import pytest
from host import ENQUEUE, PATIENCE, ROOT, Host, smtp, subject
from mariadb import PASSWORD, MariaDB
from servers import Message, Postfix, Sink, Wire
from system import System, child

pytestmark = pytest.mark.server

# As the page has them. The second is no vhost here, so that its mail is refused.
VHOST, GONE = "www.example.com", "www.gone.example"
COMMAND = "/usr/local/bin/secure-sendmail-enqueue"
SENDER = "user@example.com"
REFUSAL = f"secure-sendmail-enqueue: no maildrop for {GONE} "

DEBIAN = ROOT / ".cache/debian"
BODY = "first\n.\n..two dots\n.one dot\n.\nlast\n"
# As PHP has it in double quotes.
PHP_BODY = json.dumps(BODY)
EVERYONE = ["bcc@x.example", "cc@x.example", "one@x.example", "two@x.example"]


def rows() -> list[list[str]]:
    """The table of callers: caller, how to set it up, tested version, test."""
    lines = page.section(page.text("calling.md"), "callers")
    # With their back quotes, which tell the setting itself from what is said of it.
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def line_of(test: str) -> str:
    """How the page sets the caller of that test up: the first code of the cell."""
    (setup,) = (setup for _, setup, _, name in rows() if name == f"`{test}`")
    return setup.split("`")[1]


class Site:
    """An installation with one vhost, whose command lies elsewhere, and what came out of it."""

    def __init__(self, host: Host, wire: Wire) -> None:
        self.host = host
        self.home = host.directory / "home"
        self.home.mkdir()
        self._wire = wire
        self._command = self.script("secure-sendmail-enqueue", f'exec {ENQUEUE} --spool {host.spool} "$@"')

    def script(self, name: str, line: str) -> Path:
        path = self.host.directory / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return path

    def line(self, test: str, vhost: str = VHOST) -> str:
        """The page's line with this installation's command, and with that vhost."""
        line = line_of(test)
        assert line.count(COMMAND) == 1
        assert line.count(VHOST) == 1
        return line.replace(COMMAND, str(self._command)).replace(VHOST, vhost)

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a caller at home."""
        environment = {"PATH": "/usr/bin:/bin:/usr/sbin", "HOME": str(self.home), "LANG": "C.UTF-8"}
        environment |= {"DEAD": f"{self.home}/dead.letter", **options.pop("environment", {})}
        if "input" not in options:
            options["stdin"] = subprocess.DEVNULL
        return subprocess.run(
            command, cwd=self.home, env=environment, capture_output=True, text=True, timeout=60, **options
        )  # fmt: skip

    def php(self, code: str, *settings: str, vhost: str = VHOST) -> str:
        """What a script prints, with Debian's PHP and the page's line in php.ini; nothing may have gone wrong in PHP."""
        (self.home / "php.ini").write_text("\n".join([self.line("test_php_mail", vhost), *settings, ""]))
        script = self.home / "script.php"
        script.write_text(f"<?php\n{code}")
        run = self.run("php", "-c", self.home / "php.ini", script)
        assert run.returncode == 0, run.stdout + run.stderr
        # Where enqueue refuses, its reason is there as well.
        assert run.stderr == "" or REFUSAL in run.stderr
        return run.stdout

    def arrived(self, name: str) -> Message:
        """The one mail with that subject that has left the releaser."""
        self.host.wait_until_idle()
        (message,) = (message for message in self._wire.messages() if subject(message.data) == name)
        assert message.reply.startswith("250")
        return message

    def nothing_more(self) -> None:
        """Nothing of GONE's has arrived."""
        self.host.wait_until_idle()
        assert not [message for message in self._wire.messages() if "refused" in subject(message.data)]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Sink() as sink, Wire(sink.port) as wire, Host(mta=smtp(wire.port)) as host:
        host.add(VHOST)
        with host.running():
            yield Site(host, wire)


def values(message: Message, name: str) -> list[str]:
    """The values of all fields of that name."""
    return email.message_from_bytes(message.data).get_all(name, [])


def check(message: Message, sender: str = SENDER, recipients: list[str] = EVERYONE, vhost: str = VHOST) -> None:
    """The envelope is exactly that, the vhost is stated once and by us, nobody sees a Bcc, and the text is what was written."""
    assert (message.sender, sorted(message.recipients)) == (sender, recipients)
    assert values(message, "X-Domain") == [vhost]
    assert message.data.startswith(f"X-Domain: {vhost}\r\n".encode())
    assert values(message, "Bcc") == []
    assert b"bcc@x.example" not in message.data
    text = email.message_from_bytes(message.data).get_payload(decode=True)
    assert isinstance(text, bytes)
    # Some callers end their text with a line end more.
    assert text.replace(b"\r\n", b"\n").decode().rstrip("\n") == BODY.rstrip("\n")
    assert re.search(rb"(?<!\r)\n|\r(?!\n)", message.data) is None


def test_php_mail(site: Site) -> None:
    """mail() sends with either kind of line ends, a list of fields and all that its fifth argument may say."""
    fields = '"From: user@example.com\\r\\nCc: two@x.example, cc@x.example\\r\\nX-Domain: forged\\r\\nBcc: bcc@x.example"'
    lf_fields = fields.replace("\\r", "")
    array = """["From" => "user@example.com", "Cc" => "two@x.example, cc@x.example", "Bcc" => "bcc@x.example",
        "X-Domain" => ["forged", "twice"]]"""
    crlf = PHP_BODY.replace("\\n", "\\r\\n")
    mixed = ("mail.mixed_lf_and_crlf = On", "mail.add_x_header = On")
    for number, (settings, code) in enumerate([
        ((), f'mail("one@x.example", $subject, {PHP_BODY}, {fields})'),
        (mixed, f'mail("one@x.example", $subject, {PHP_BODY}, {fields})'),
        ((), f'mail("one@x.example", $subject, {crlf}, {lf_fields})'),
        (mixed, f'mail("one@x.example", $subject, {crlf}, {array})'),
    ]):  # fmt: skip
        assert site.php(f'$subject = "php {number}"; echo {code} ? "sent" : "refused";', *settings) == "sent"
        check(site.arrived(f"php {number}"))
        assert values(site.arrived(f"php {number}"), "X-PHP-Originating-Script") == (["0:script.php"] if settings else [])
    for number, (words, sender, more) in enumerate([
        ("-fbounce@example.com", "bounce@example.com", []),
        ("-f bounce@example.com -oi two@x.example", "bounce@example.com", ["two@x.example"]),
        ("two@x.example", SENDER, ["two@x.example"]),
    ]):  # fmt: skip
        mail = f'mail("one@x.example", "fifth {number}", {PHP_BODY}, [], "{words}")'
        assert site.php(f'echo {mail} ? "sent" : "refused";') == "sent"
        check(site.arrived(f"fifth {number}"), sender, ["one@x.example", *more])
    forced = "mail.force_extra_parameters = -fforced@example.com"
    assert site.php(f'mail("one@x.example", "forced", {PHP_BODY}, [], "-fbounce@example.com");', forced) == ""
    check(site.arrived("forced"), "forced@example.com", ["one@x.example"])
    assert site.php('var_dump(mail("one@x.example", "refused", "text"));', vhost=GONE) == "bool(false)\n"
    site.nothing_more()


PHPMAILER = f"""
require "/usr/share/php/libphp-phpmailer/autoload.php";
$mail = new PHPMailer\\PHPMailer\\PHPMailer(true);
$mail->setFrom("user@example.com", "A User");
$mail->Sender = "bounce@example.com";
$mail->addAddress("one@x.example", "One");
$mail->addAddress("two@x.example");
$mail->addCC("cc@x.example");
$mail->addBCC("bcc@x.example");
$mail->addCustomHeader("X-Domain", "forged");
$mail->Body = {PHP_BODY};
"""


@pytest.mark.parametrize(("call", "complaint"), [("isMail", "instantiate mail function"), ("isSendmail", "execute: ")])
def test_phpmailer(site: Site, call: str, complaint: str) -> None:
    """PHPMailer sends through mail() and, with sendmail_path, by itself; where that fails, it throws."""
    send = 'try { $mail->send(); echo "sent"; } catch (Exception $e) { echo $e->getMessage(); }'
    assert site.php(f'{PHPMAILER} $mail->{call}(); $mail->Subject = "{call}"; {send}') == "sent"
    check(site.arrived(call), "bounce@example.com")
    assert complaint in site.php(f'{PHPMAILER} $mail->{call}(); $mail->Subject = "refused"; {send}', vhost=GONE)
    site.nothing_more()


SYMFONY = f"""
require "/usr/share/php/Symfony/Component/Mailer/autoload.php";
$mail = (new Symfony\\Component\\Mime\\Email())->from("A User <user@example.com>")->sender("bounce@example.com")
    ->to("One <one@x.example>", "two@x.example")->cc("cc@x.example")->bcc("bcc@x.example")->text({PHP_BODY});
$mail->getHeaders()->addTextHeader("X-Domain", "forged");
function send($dsn, $mail) {{
    try {{
        (new Symfony\\Component\\Mailer\\Mailer(Symfony\\Component\\Mailer\\Transport::fromDsn($dsn)))->send($mail);
        echo "sent";
    }} catch (Symfony\\Component\\Mailer\\Exception\\TransportException $e) {{
        echo $e->getMessage();
    }}
}}
"""


def test_symfony_native(site: Site) -> None:
    """Symfony's native transport gives its own recipients instead of -t; where that fails, it throws with enqueue's reason."""
    send = 'send("native://default", $mail->subject("{}"));'
    assert site.php(SYMFONY + send.format("symfony native")) == "sent"
    check(site.arrived("symfony native"), "bounce@example.com")
    said = site.php(SYMFONY + send.format("refused"), vhost=GONE)
    assert said.startswith(f"Process failed with exit code 78: {REFUSAL}")
    site.nothing_more()


def test_symfony_sendmail(site: Site) -> None:
    """Symfony's sendmail transport does so too; its own default, SMTP on standard input, is refused with a sentence."""

    def dsn(vhost: str) -> str:
        return site.line("test_symfony_sendmail", vhost).removeprefix("MAILER_DSN=").strip('"')

    assert site.php(f'{SYMFONY} send("{dsn(VHOST)}", $mail->subject("symfony sendmail"));') == "sent"
    # Without a sender in the command it is the mail's.
    check(site.arrived("symfony sendmail"), "bounce@example.com")
    said = site.php(f'{SYMFONY} send("{dsn(GONE)}", $mail->subject("refused"));')
    assert said.startswith(f"Process failed with exit code 78: {REFUSAL}")
    smtp_mode = dsn(VHOST).replace("%20-t", "%20-bs")
    said = site.php(f'{SYMFONY} send("{smtp_mode}", $mail->subject("refused"));')
    assert '"421"' in said
    assert "SMTP on standard input is not offered; call with -t -i" in said
    site.nothing_more()


WORDPRESS = """
foreach ([
    "ABSPATH" => "{directory}/", "WP_INSTALLING" => {installing}, "WP_HTTP_BLOCK_EXTERNAL" => true, "DISABLE_WP_CRON" => true,
    "DB_NAME" => "wordpress", "DB_USER" => "wordpress", "DB_PASSWORD" => "{password}", "DB_HOST" => "127.0.0.1:{port}",
    "DB_CHARSET" => "utf8mb4", "DB_COLLATE" => "",
] as $name => $value) define($name, $value);
$_SERVER += ["HTTP_HOST" => "www.example.com", "SERVER_NAME" => "www.example.com", "REQUEST_URI" => "/index.php"];
$table_prefix = "wp_";
require ABSPATH . "wp-settings.php";
{code}
"""

INSTALL = """
require ABSPATH . "wp-admin/includes/upgrade.php";
wp_install("A Site", "admin", "one@x.example", true, "", "not a secret");
"""

WP_MAIL = f"""
add_action("wp_mail_failed", function ($error) {{ echo $error->get_error_message(), " "; }});
$headers = ["From: A User <from@example.com>", "Cc: cc@x.example", "Bcc: bcc@x.example", "X-Domain: forged"];
echo wp_mail(["One <one@x.example>", "two@x.example"], "%s", {PHP_BODY}, $headers) ? "sent" : "refused";
"""


def test_wordpress(site: Site) -> None:
    """A WordPress that its own installer has made, on MariaDB, says so by mail, and wp_mail() sends or returns false."""
    with MariaDB() as server:
        server.root("CREATE DATABASE wordpress", database=None)
        server.root(f"GRANT ALL ON wordpress.* TO wordpress@'%' IDENTIFIED BY '{PASSWORD}'", database=None)

        def run(code: str, vhost: str = VHOST, installing: str = "false") -> str:
            names = {"directory": DEBIAN / "wordpress/usr/share/wordpress", "password": PASSWORD, "port": server.port}
            template = re.sub(r"{(directory|password|port)}", lambda found: str(names[found[1]]), WORDPRESS)
            return site.php(template.replace("{installing}", installing).replace("{code}", code), vhost=vhost)

        assert run(INSTALL, installing="true") == ""
        assert site.arrived("New WordPress Site").recipients == ["one@x.example"]
        assert run(WP_MAIL % "wordpress") == "sent"
        check(site.arrived("wordpress"))
        assert values(site.arrived("wordpress"), "From") == ["A User <from@example.com>"]
        assert run(WP_MAIL % "refused", vhost=GONE) == "Could not instantiate mail function. refused"
    site.nothing_more()


PEAR = f"""
error_reporting(E_ALL & ~E_DEPRECATED);
require "Mail.php";
$headers = ["From" => "user@example.com", "To" => "one@x.example, two@x.example", "Cc" => "cc@x.example",
    "X-Domain" => "forged", "Return-Path" => "bounce@example.com"];
function send($mailer, $headers, $subject, $recipients) {{
    $sent = $mailer->send($recipients, ["Subject" => $subject] + $headers, {PHP_BODY});
    echo $sent === true ? "sent" : $sent->getMessage();
}}
"""


def test_pear_mail_sendmail(site: Site) -> None:
    """PEAR's driver names every recipient and ends the options with `--`; it returns an error with the exit status."""

    def code(subject: str, vhost: str) -> str:
        factory = site.line("test_pear_mail_sendmail", vhost)
        return f'{PEAR} send({factory}, $headers + ["Bcc" => "hidden@x.example"], "{subject}", {json.dumps(EVERYONE)});'

    assert site.php(code("pear sendmail", VHOST)) == "sent"
    check(site.arrived("pear sendmail"), "bounce@example.com")
    # The field of the header names somebody else, who is no recipient, and who is not shown either.
    assert b"hidden@x.example" not in site.arrived("pear sendmail").data
    assert site.php(code("refused", GONE)) == "sendmail returned error code 78"
    site.nothing_more()


def test_pear_mail_mail(site: Site) -> None:
    """PEAR's other driver is mail(), which takes the other recipients from the header."""
    more = '$headers + ["Bcc" => "bcc@x.example"]'
    to = '"one@x.example, two@x.example"'
    code = PEAR + f'send(Mail::factory("mail", "-fbounce@example.com"), {more}, "%s", {to});'
    assert site.php(code % "pear mail") == "sent"
    check(site.arrived("pear mail"), "bounce@example.com")
    assert site.php(code % "refused", vhost=GONE) == "mail() returned failure"
    site.nothing_more()


NODEMAILER = """
const nodemailer = require("nodemailer");
const transport = %s;
transport.sendMail({
    from: "A User <from@example.com>", to: "One <one@x.example>, two@x.example", cc: "cc@x.example",
    bcc: "bcc@x.example", subject: "%s", headers: {"X-Domain": "forged"}, text: %s,
}).then(() => console.log("sent"), error => console.log(error.message));
"""


def test_nodemailer(site: Site) -> None:
    """nodemailer puts its own option before the vhost and leaves the Bcc in the header; it fails with the exit status."""

    def said(subject: str, vhost: str) -> str:
        code = NODEMAILER % (site.line("test_nodemailer", vhost), subject, json.dumps(BODY))
        # Where Debian's packages are, for whatever build of Node.js there is.
        run = site.run("node", "-e", code, environment={"NODE_PATH": "/usr/share/nodejs"})
        assert (run.returncode, run.stderr) == (0, "")
        return run.stdout

    assert said("nodemailer", VHOST) == "sent\n"
    check(site.arrived("nodemailer"))
    assert said("refused", GONE) == "Sendmail exited with code 78\n"
    site.nothing_more()


def send_email(site: Site, test: str, name: str, *words: str, vhost: str = VHOST) -> subprocess.CompletedProcess[str]:
    """Runs git send-email, set up with the page's commands."""
    # Who the committer is; git asks, and does not use it.
    (site.home / ".gitconfig").write_text('[user]\nname = "A User"\nemail = user@example.com\n')
    site.run("sh", "-ec", site.line(test, vhost), check=True)
    (site.home / "0001.patch").write_text(f"From: A User <from@example.com>\nSubject: {name}\nX-Domain: forged\n\n{BODY}")
    addresses = ["--to=one@x.example", "--to=Two <two@x.example>", "--cc=cc@x.example", "--bcc=bcc@x.example"]
    settings = ["--from=A User <from@example.com>", "--confirm=never", "--suppress-cc=all"]
    return site.run("git", "send-email", *settings, *addresses, *words, "0001.patch")


def git_send_email(site: Site, test: str) -> None:
    for words, sender in ([], SENDER), (["--envelope-sender=bounce@example.com"], "bounce@example.com"):
        name = f"{test} {sender}"
        run = send_email(site, test, name, *words)
        assert (run.returncode, run.stderr) == (0, "")
        check(site.arrived(name), sender)
    run = send_email(site, test, "refused", vhost=GONE)
    assert run.returncode != 0
    assert REFUSAL in run.stderr
    site.nothing_more()


def test_git_send_email(site: Site) -> None:
    """git send-email names every recipient, no sender unless it is told one, and fails where enqueue does."""
    git_send_email(site, "test_git_send_email")


def test_git_send_email_smtp_server(site: Site) -> None:
    """So it does with the settings that older versions know, in which a path with a slash is no server."""
    git_send_email(site, "test_git_send_email_smtp_server")


def mailx(site: Site, program: str | Path, rc: str, name: str) -> subprocess.CompletedProcess[str]:
    """Runs a mailx with one line of settings, which older and newer ones call the same way."""
    (site.home / "rc").write_text(rc + "\n")
    (site.home / "dead.letter").unlink(missing_ok=True)
    words = ["-r", "user@example.com", "-c", "cc@x.example", "-b", "bcc@x.example", "-s", name, "one@x.example", "two@x.example"]
    return site.run(program, *words, input=BODY, environment={"MAILRC": str(site.home / "rc")})


def test_bsd_mailx(site: Site) -> None:
    """bsd-mailx takes no options in its setting, so it needs a script; what is refused it keeps in dead.letter."""
    program = DEBIAN / "bsd-mailx/usr/bin/bsd-mailx"
    script = site.script("sendmail", site.line("test_bsd_mailx"))
    run = mailx(site, program, f"set sendmail={script}", "bsd-mailx")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    check(site.arrived("bsd-mailx"))
    script = site.script("sendmail", site.line("test_bsd_mailx", GONE))
    run = mailx(site, program, f"set sendmail={script}", "refused")
    assert run.returncode == 1
    assert REFUSAL in run.stderr
    assert "last\n" in (site.home / "dead.letter").read_text()
    site.nothing_more()


def s_nail(site: Site, test: str) -> str:
    """What it writes to standard error where all is well."""
    run = mailx(site, "s-nail", site.line(test), test)
    assert (run.returncode, run.stdout) == (0, "")
    check(site.arrived(test))
    refused = mailx(site, "s-nail", site.line(test, GONE), "refused")
    assert refused.returncode == 4
    assert REFUSAL in refused.stderr
    assert "message not sent" in refused.stderr
    assert "last\n" in (site.home / "dead.letter").read_text()
    site.nothing_more()
    return run.stderr


def test_s_nail(site: Site) -> None:
    """s-nail puts its own option before the vhost and names every recipient; what is refused it keeps in dead.letter."""
    assert s_nail(site, "test_s_nail") == ""


def test_s_nail_heirloom(site: Site) -> None:
    """It still knows the names that the settings had in heirloom-mailx."""
    assert "please use *mta*" in s_nail(site, "test_s_nail_heirloom")


PIPES = {
    "perl": """
open(my $mail, "|-", $ARGV[0]) or die;
print $mail $ARGV[1];
close($mail);
print $? >> 8;
""",
    "python3": """
import subprocess, sys
print(subprocess.run(sys.argv[1], shell=True, input=sys.argv[2], text=True).returncode, end="")
""",
}


def pipe(site: Site, program: str, option: str) -> None:
    header = "From: user@example.com\nTo: one@x.example, two@x.example\nCc: cc@x.example\nX-Domain: forged\nBcc: bcc@x.example\n"
    for name, vhost in (f"{program} pipe", VHOST), ("refused", GONE):
        line = site.line(f"test_pipe_{program}", vhost)
        run = site.run(program, option, PIPES[program], line, f"{header}Subject: {name}\n\n{BODY}")
        if vhost == VHOST:
            assert (run.returncode, run.stdout, run.stderr) == (0, "0", "")
        else:
            assert run.stdout == "78"
            assert run.stderr.startswith(REFUSAL)
    check(site.arrived(f"{program} pipe"), "bounce@example.com")
    site.nothing_more()


def test_pipe_perl(site: Site) -> None:
    """A Perl script's pipe to `sendmail -oi -t` needs the vhost only."""
    pipe(site, "perl", "-e")


def test_pipe_python3(site: Site) -> None:
    """So does a Python script's."""
    pipe(site, "python3", "-c")


# Cron's own directories, and those of PAM and of syslog; nothing of the machine's own is left that a cron would start.
CRON = """
mount -t tmpfs tmpfs /var/spool
mkdir -p /var/spool/cron/crontabs
mount -t tmpfs tmpfs /run
[ ! -d /etc/cron.d ] || mount -t tmpfs tmpfs /etc/cron.d
[ ! -e /etc/crontab ] || mount --bind /dev/null /etc/crontab
mount -t tmpfs tmpfs /etc/pam.d
for kind in auth account session; do echo "$kind required pam_permit.so"; done > /etc/pam.d/cron
mount --bind "$1" /usr/sbin
for name in null random urandom zero; do
    : > "$4/$name"
    mount --bind "/dev/$name" "$4/$name"
done
mount --bind "$4" /dev
for user in c1 c2 root; do
    to=one@x.example
    [ $user != c2 ] || to=one@two@x.example
    printf '%s\\n' MAILTO=$to HOME=/ "@reboot printf '$2'" > "/var/spool/cron/crontabs/$user"
    chmod 600 "/var/spool/cron/crontabs/$user"
    chown "$user" "/var/spool/cron/crontabs/$user"
done
exec "$3" -f
"""


def test_cron(sink: Sink, postfix: Postfix) -> None:
    """Cron's mail of a user's job goes out as the host's, through a script in the place of sendmail; root's goes to the MTA."""
    with Wire(sink.port) as wire, System(mta=smtp(wire.port)) as system, socket(AF_UNIX, SOCK_DGRAM) as syslog:
        syslog.settimeout(PATIENCE)
        system.cli("vhost", "add", "--unregistered")
        system.start()
        programs = system.directory / "sbin"
        programs.mkdir(mode=0o755)
        script = page.fence(page.text("calling.md"), "sendmail").replace(
            COMMAND, f"{system.programs}/secure-sendmail-enqueue --spool {system.spool}"
        )
        for name, text in ("sendmail", script), ("sendmail.distrib", f'#!/bin/sh\nexec {postfix.sendmail()} "$@"\n'):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (programs / "mailq").symlink_to("sendmail")
        devices = system.directory / "dev"
        devices.mkdir(mode=0o755)
        syslog.bind(str(devices / "log"))
        (devices / "log").chmod(0o666)
        arguments = [programs, json.dumps(BODY)[1:-1], DEBIAN / "cron/usr/sbin/cron", devices]
        cron = subprocess.Popen(system.words(["sh", "-ec", CRON, "cron", *arguments]), stdin=subprocess.DEVNULL)
        said = ""
        try:
            system.wait(lambda: len(sink.messages()) >= 2, "both mails of cron's that are accepted")
            while "(c2) MAIL" not in said:
                said += syslog.recv(1000).decode() + "\n"
        finally:
            os.kill(child(cron.pid), signal.SIGTERM)
            cron.wait(30)
        system.wait_until_idle()
        (message,) = wire.messages()
        check(message, f"c1@{os.uname().nodename}", ["one@x.example"], vhost="host.example.com")
        # It is the MTA that gives such an address the host's name.
        assert values(message, "From") == ["root (Cron Daemon)"]
        # Of root's, no tag, and no row of ours.
        (other,) = (each for each in sink.messages() if each.sender.startswith("root@"))
        assert values(other, "X-Domain") == []
        assert {(row["event"], row["vhost"]) for row in system.rows()} == {("released", "host.example.com")}
        # Cron tells of what was refused in syslog only, and so does enqueue.
        assert "secure-sendmail-enqueue" in said
        assert re.search(r"\(c2\) MAIL \(mailed \d+ bytes of output but got status 0x0041 from MTA", said)
        # What the MTA's command is beside taking mail, and what a link instead of the script does.
        assert "Mail queue is empty" in system.run("mailq", env={"PATH": "/usr/sbin:/usr/bin:/bin"}).stdout
        (system.directory / "link").symlink_to(system.programs / "secure-sendmail-enqueue")
        run = system.run(system.directory / "link", "-t", "-i", user="c1", input=f"To: one@x.example\n\n{BODY}")
        assert (run.returncode, run.stdout) == (64, "")
        assert run.stderr.startswith("secure-sendmail-enqueue: no vhost: ")


def test_settings_need_what_the_page_says(site: Site) -> None:
    """Without the word sendmail PHPMailer runs another command, without -t Symfony takes none, without -i it doubles dots."""
    other = 'sendmail_path = "/usr/local/bin/enqueue www.example.com -t -i"'
    assert site.php(f"{PHPMAILER} $mail->isSendmail(); echo $mail->Sendmail;", other) == "/usr/sbin/sendmail"
    whole = site.line("test_php_mail")
    send = (
        'try { send("native://default", $mail->subject("dots")); } catch (InvalidArgumentException $e) { echo $e->getMessage(); }'
    )
    assert "Unsupported sendmail command flags" in site.php(SYMFONY + send, whole.replace(" -t", ""))
    assert site.php(SYMFONY + send, whole.replace(" -i", "")) == "sent"
    assert b"\n...two dots" in site.arrived("dots").data


def test_every_test_has_its_row() -> None:
    """The page's table names the tests of callers, each once, and no others."""
    own = {"test_settings_need_what_the_page_says", "test_every_test_has_its_row", "test_versions_are_those_of_the_page"}
    tests = {name for name in vars(sys.modules[__name__]) if name.startswith("test_")} - own
    assert sorted(name.strip("`") for *_, name in rows()) == sorted(tests)


def version(package: str) -> str:
    """The upstream version of a Debian package, installed or unpacked."""
    control = DEBIAN / package / "DEBIAN/control"
    if control.exists():
        (found,) = re.findall(r"^Version: (.*)$", control.read_text(), re.MULTILINE)
    else:
        command = ["dpkg-query", "-W", "-f", "${Version}", package]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^\d+:|-[^-]*$", "", found)


@pytest.mark.parametrize("cell", sorted({row[2] for row in rows()}))
def test_versions_are_those_of_the_page(cell: str) -> None:
    """The first two numbers of every tested version are what is there."""
    package, documented = cell.split()
    numbers = [re.findall(r"\d+", each)[:2] for each in (documented, version(package))]
    assert numbers[0] == numbers[1]
