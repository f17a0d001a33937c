"""The administrator's command: reads the spool and the ledger, writes decisions; moves no mail itself."""
