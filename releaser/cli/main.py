"""secure-sendmail: its verbs, and what each kind of failure exits with."""

import os
import sqlite3
import sys

import click

from releaser import config, private
from releaser.cli import check, hold, output, report, vhost
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
secure_sendmail.add_command(report.limits_)
secure_sendmail.add_command(report.log_)
secure_sendmail.add_command(report.status)
secure_sendmail.add_command(check.check)


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(words: list[str]) -> int:
    """Carry out WORDS; return the exit status."""
    # Names and arguments may hold bytes that are no UTF-8; what is printed must never end in a traceback.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        result = secure_sendmail.main(words, prog_name="secure-sendmail", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.UsageError as error:
        output.complain(error.format_message())
        return os.EX_USAGE
    except click.Abort:
        output.complain("nothing was done")
        return 1
    except (config.ConfigError, private.NotOurs) as error:
        output.complain(str(error))
        return os.EX_CONFIG
    except BrokenPipeError:
        # The reader, `head` for example, has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (Failed, LedgerError, OSError, sqlite3.Error) as error:
        output.complain(str(error))
        return 1


if __name__ == "__main__":
    main()
