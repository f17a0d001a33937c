"""secure-sendmail: its verbs, and what each kind of failure exits with."""

import io
import os
import signal
import sqlite3
import sys

import click

from releaser import config, identity, provision
from releaser.cli import check, hold, log, log_store, output, report, vhost
from releaser.cli.context import Context, Failed
from releaser.ledger import LedgerError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "file", default=config.DEFAULT_FILE, metavar="FILE", help=f"Default: {config.DEFAULT_FILE}")
@click.pass_context
def secure_sendmail(context: click.Context, file: str) -> None:
    """Review held mail, look after vhosts and their limits, read the log.

    Exit status: 0 done, also when only recorded because the releaser is not running; 1 an id is unknown or something
    failed; 64 usage; 78 the configuration or the spool cannot be used.
    """
    context.obj = Context(file)


secure_sendmail.add_command(hold.hold)
secure_sendmail.add_command(vhost.vhost)
secure_sendmail.add_command(vhost.stop)
secure_sendmail.add_command(vhost.resume)
secure_sendmail.add_command(report.limits_)
for verb in log_store.VERBS:
    log.log_.add_command(verb)
secure_sendmail.add_command(log.log_)
secure_sendmail.add_command(report.status)
secure_sendmail.add_command(log.top)
secure_sendmail.add_command(log.trace)
secure_sendmail.add_command(check.check)


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(words: list[str]) -> int:
    """Carry out WORDS; return the exit status."""
    _hold_standard_streams()
    for word in words:
        if not word.isprintable() and any("\ud800" <= character <= "\udfff" for character in word):
            output.complain(f"{word[:80]!r} is not UTF-8")
            return os.EX_USAGE
    try:
        with secure_sendmail.make_context("secure-sendmail", list(words)) as context:
            secure_sendmail.invoke(context)
            sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            # Its text is the help, in several lines of our own.
            print(error.format_message(), file=sys.stderr)
        else:
            output.complain(error.format_message())
        return os.EX_USAGE
    except click.Abort:
        output.complain("nothing was done")
        return 1
    except KeyboardInterrupt:
        output.complain("interrupted")
        return 128 + signal.SIGINT
    except (config.ConfigError, identity.NotOurs) as error:
        output.complain(str(error))
        return os.EX_CONFIG
    except BrokenPipeError:
        # The reader, `head` for example, has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        output.complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
        return 1
    except (Failed, LedgerError, identity.ChildFailed, provision.Refused, sqlite3.Error) as error:
        output.complain(str(error))
        return 1


def _hold_standard_streams() -> None:
    """Where the caller has closed one, it is /dev/null; and what is printed never ends in a traceback."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
