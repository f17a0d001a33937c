-- From version 1 of the log's tables to version 2: what is looked for is found by an index. `secure-sendmail log migrate`
-- runs it, `--print` prints it. Where an earlier run has ended halfway, the errors 1060, 1061 and 1091 say so, and mean nothing.
ALTER TABLE mail_log ADD COLUMN sender_lower VARCHAR(320) GENERATED ALWAYS AS (LOWER(sender)) VIRTUAL;

ALTER TABLE mail_log ADD COLUMN recipient_lower VARCHAR(320) GENERATED ALWAYS AS (LOWER(recipient)) VIRTUAL;

ALTER TABLE mail_log
    DROP KEY mail_log_recipient,
    ADD KEY mail_log_event (event, logged_at),
    ADD KEY mail_log_sender (sender_lower, logged_at),
    ADD KEY mail_log_recipient_lower (recipient_lower, logged_at),
    ADD KEY mail_log_message_id (message_id),
    ADD KEY mail_log_mta_queue_id (mta_queue_id);

INSERT INTO mail_log_schema (version) VALUES (2);
