"""The sendmail_path command: standard library only, opens no network, no database and no secret."""
