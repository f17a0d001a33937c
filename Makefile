PYTHON ?= python3
BIN := .venv/bin
# One word: a path with white space cannot be a script's interpreter.
HERE := $(CURDIR)

# Where `make install` puts things; DESTDIR, for packages, goes before each path and into no file.
PREFIX ?= /usr/local
LIBRARY = $(PREFIX)/lib/php-secure-sendmail
# What the enqueue command is started through; not in LIBRARY, which an upgrade replaces as a whole.
START = $(PREFIX)/libexec/php-secure-sendmail
INSTALLED = $(DESTDIR)$(LIBRARY)
CONFIGURATION = $(DESTDIR)/etc/php-secure-sendmail
DOCUMENTATION = $(DESTDIR)$(PREFIX)/share/doc/php-secure-sendmail
# As systemd spells the path of the spool.
SPOOL_MOUNT = var-spool-php\x2dsecure\x2dsendmail.mount

.PHONY: venv install uninstall run test test-quick fuzz soak bench lint lock clean

venv: .venv/runtime

.venv/runtime: requirements.lock pyproject.toml enqueue/secure-sendmail-enqueue.in Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.11 venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@# Of another interpreter, it is made anew, or it would be a mixture; else the commands in it work on meanwhile.
	which='import sys; print(sys.base_prefix, sys.version)'; \
		[ "$$($(BIN)/python -c "$$which" 2>/dev/null)" = "$$($(PYTHON) -c "$$which")" ] || clear=--clear; \
		$(PYTHON) -m venv $$clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@# The enqueue command starts without the virtual environment: it needs the standard library only, and speed.
	sed -e "s|@START@|$$($(BIN)/python -c 'import sys; print(sys._base_executable)')|" -e 's|@LIBRARY@|$(HERE)|' \
		enqueue/secure-sendmail-enqueue.in > $(BIN)/secure-sendmail-enqueue
	chmod 0755 $(BIN)/secure-sendmail-enqueue
	$(BIN)/python -m compileall -q enqueue
	@touch $@

.venv/development: .venv/runtime requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

# For the system's Python with Debian's packages: no virtual environment, no network. Also an upgrade, while it runs: PHP's
# mail is refused for no longer than lies between two renames, and no module of the older version stays.
install: PYTHON = /usr/bin/python3
install:
	@[ -n "$(DESTDIR)" ] || $(PYTHON) -I -c 'import click, pymysql, rich, watchdog' || { \
		echo "Missing; on Debian: apt-get install python3-click python3-pymysql python3-rich python3-watchdog"; exit 1; }
	@start="$(START)"; case $${#start}$$start in ???/* | *[[:space:]]*) \
		echo "PREFIX=$(PREFIX): cannot be in the first line of a script: it has a blank, or more than 70 characters"; exit 1; esac
	@set -eu; umask 022; \
	put() { mkdir -p "$${3%/*}"; \
		sed -e 's|@PYTHON@|$(PYTHON)|' -e 's|@START@|$(START)/python3|' -e 's|@LIBRARY@|$(LIBRARY)|' -e "s|@MODULE@|$${4:-}|" \
			-e 's|@BIN@|$(PREFIX)/bin|' -e 's|/usr/local/bin|$(PREFIX)/bin|' "$$2" > "$$3.new"; \
		chmod "$$1" "$$3.new"; mv -f "$$3.new" "$$3"; }; \
	rm -rf "$(INSTALLED).new" "$(INSTALLED).old"; \
	for directory in enqueue releaser releaser/cli; do \
		mkdir -p "$(INSTALLED).new/$$directory"; install -m 0644 $$directory/*.py "$(INSTALLED).new/$$directory"; done; \
	for file in config/schema*.sql; do put 0644 $$file "$(INSTALLED).new/$$file"; done; \
	$(PYTHON) -I "$(INSTALLED).new/enqueue/bundle.py" "$(DESTDIR)$(START)"; \
	$(PYTHON) -I -m compileall -q --invalidation-mode unchecked-hash \
		-s "$(INSTALLED).new" -p "$(LIBRARY)" "$(INSTALLED).new"; \
	[ ! -e "$(INSTALLED)" ] || mv -T "$(INSTALLED)" "$(INSTALLED).old"; \
	mv -T "$(INSTALLED).new" "$(INSTALLED)"; rm -rf "$(INSTALLED).old"; \
	put 0755 enqueue/secure-sendmail-enqueue.in "$(DESTDIR)$(PREFIX)/bin/secure-sendmail-enqueue"; \
	put 0755 releaser/command.in "$(DESTDIR)$(PREFIX)/bin/secure-sendmail-releaser" releaser.daemon; \
	put 0755 releaser/command.in "$(DESTDIR)$(PREFIX)/bin/secure-sendmail" releaser.cli.main; \
	put 0644 config/systemd/secure-sendmail-releaser.service.in \
		"$(DESTDIR)$(PREFIX)/lib/systemd/system/secure-sendmail-releaser.service"; \
	put 0644 config/systemd/spool.mount "$(DESTDIR)$(PREFIX)/lib/systemd/system/"'$(SPOOL_MOUNT)'; \
	put 0644 config/sysusers.conf "$(DESTDIR)$(PREFIX)/lib/sysusers.d/php-secure-sendmail.conf"; \
	put 0644 config/tmpfiles.conf "$(DESTDIR)$(PREFIX)/lib/tmpfiles.d/php-secure-sendmail.conf"; \
	for file in README.md calling.md spool_layout.md faults.md LICENSE config/apache.conf config/php-fpm.conf \
		config/releaser.toml config/systemd/sendmail-setgid.conf; do put 0644 $$file "$(DOCUMENTATION)/$${file##*/}"; done; \
	for file in nftables.conf postfix.cf exim.conf; do put 0644 config/mta/$$file "$(DOCUMENTATION)/mta/$$file"; done; \
	[ -d "$(CONFIGURATION)/vhosts.d" ] || install -d -m 0750 "$(CONFIGURATION)" "$(CONFIGURATION)/vhosts.d"; \
	[ -e "$(CONFIGURATION)/releaser.toml" ] || put 0640 config/releaser.toml "$(CONFIGURATION)/releaser.toml"; \
	[ -e "$(DESTDIR)/etc/logrotate.d/php-secure-sendmail" ] || \
		put 0644 config/logrotate.conf "$(DESTDIR)/etc/logrotate.d/php-secure-sendmail"

# Leaves configuration, spool, state, logs and the user: there may be mail.
uninstall:
	rm -rf "$(INSTALLED)" "$(DESTDIR)$(START)" "$(DOCUMENTATION)"
	cd "$(DESTDIR)$(PREFIX)" && rm -f bin/secure-sendmail bin/secure-sendmail-releaser bin/secure-sendmail-enqueue \
		lib/systemd/system/secure-sendmail-releaser.service 'lib/systemd/system/$(SPOOL_MOUNT)' \
		lib/sysusers.d/php-secure-sendmail.conf lib/tmpfiles.d/php-secure-sendmail.conf
	rm -f "$(DESTDIR)/etc/logrotate.d/php-secure-sendmail"

run: .venv/runtime
	@$(BIN)/python tryout.py $(if $(ONCE),--once)

test: .venv/development
	@bash tests/packages.sh
	@sh tests/mounts.sh $(BIN)/python -m pytest

# Without servers: no root, no Debian packages.
test-quick: .venv/development
	$(BIN)/python -m pytest -m "not server"

# Looks for inputs that the scanners cannot stand, guided by coverage; ends by itself.
MINUTES ?= 10
fuzz: .venv/fuzz
	mkdir -p var/fuzz/corpus
	$(BIN)/python tests/fuzz.py var/fuzz/corpus -max_total_time=$$(($(MINUTES) * 60)) -max_len=8192 -timeout=60 -print_final_stats=1 \
		-artifact_prefix=var/fuzz/

# Random senders, attacks, kills and faults of all that is around, for so long, and then a reckoning of every mail. As root.
# SEED is printed; the same one makes the same acts.
soak: .venv/development
	@bash tests/packages.sh
	@SOAK_SEED=$(or $(SEED),random) SOAK_MINUTES=$(MINUTES) sh tests/mounts.sh $(BIN)/python -m pytest -s tests/test_e2e_soak.py

# Beside its peers on this machine, in about five minutes; SCALE=full is the long one. As root.
bench: .venv/development
	@bash tests/packages.sh nullmailer:usr/sbin/nullmailer-queue time:usr/bin/time
	@$(if $(filter here,$(FS)),,sh tests/mounts.sh sh bench/ext4.sh) $(BIN)/python bench $(if $(filter full,$(SCALE)),--full) $(ONLY)

.venv/fuzz: .venv/development requirements-fuzz.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-fuzz.lock
	@touch $@

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy enqueue releaser tests/servers.py

# Needs uv. The locks hold for every platform.
lock:
	echo setuptools | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate pyproject.toml - -o requirements.lock
	echo setuptools | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --extra dev pyproject.toml - -o requirements-dev.lock
	@# Later ones have no build for Python 3.11.
	echo 'atheris<3.1' | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate - -o requirements-fuzz.lock

clean:
	rm -rf .venv var *.egg-info
