"""The daemon that releases, holds and logs mail, and, in cli/, the administrator's command."""
