-- The log of record, version 2: a row per recipient and event. For MySQL 8 and MariaDB 10.11; safe to run again.
-- `secure-sendmail log init` runs it in the configured database, `--print` prints it.
CREATE TABLE IF NOT EXISTS mail_log (
    -- Which ledger wrote the row, and its number there: together they make every row ship exactly once.
    node CHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    seq BIGINT UNSIGNED NOT NULL,
    host VARCHAR(255) NOT NULL,
    -- UTC. arrived_at is when enqueue wrote the message.
    logged_at DATETIME(6) NOT NULL,
    arrived_at DATETIME(6) NULL,
    event VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    queue_id VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    message_id VARCHAR(255) NOT NULL,
    vhost VARCHAR(255) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    -- Of the owner of the submitted file; verified is 1 where it is one that may submit for the vhost.
    uid BIGINT UNSIGNED NULL,
    verified TINYINT NOT NULL,
    sender VARCHAR(320) NOT NULL,
    recipient VARCHAR(320) NOT NULL,
    size BIGINT UNSIGNED NOT NULL,
    subject VARCHAR(255) NOT NULL,
    -- What the caller claims of itself.
    script VARCHAR(1000) NOT NULL,
    cwd VARCHAR(1000) NOT NULL,
    reason VARCHAR(1000) NOT NULL,
    mta_queue_id VARCHAR(255) NOT NULL,
    -- The person who decided, where one did.
    actor VARCHAR(255) NOT NULL,
    -- What addresses are looked for by.
    sender_lower VARCHAR(320) GENERATED ALWAYS AS (LOWER(sender)) VIRTUAL,
    recipient_lower VARCHAR(320) GENERATED ALWAYS AS (LOWER(recipient)) VIRTUAL,
    PRIMARY KEY (node, seq),
    KEY mail_log_age (node, logged_at),
    KEY mail_log_time (logged_at),
    KEY mail_log_queue_id (queue_id),
    KEY mail_log_vhost (vhost, logged_at),
    KEY mail_log_event (event, logged_at),
    KEY mail_log_sender (sender_lower, logged_at),
    KEY mail_log_recipient_lower (recipient_lower, logged_at),
    KEY mail_log_message_id (message_id),
    KEY mail_log_mta_queue_id (mta_queue_id)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

CREATE TABLE IF NOT EXISTS mail_log_schema (
    version INT NOT NULL,
    PRIMARY KEY (version)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

INSERT INTO mail_log_schema (version)
    SELECT 2 FROM (SELECT COUNT(*) AS found FROM mail_log_schema) AS present WHERE present.found = 0;
