//! What a coordination server keeps: one SQLite file, one thread that touches it.
//!
//! Registrations are committed before they are answered; everything else is written behind. The
//! file survives `kill -9` at any point (WAL, `synchronous=NORMAL`). Auth keys live only here, so
//! that `ringtail coord keys` may add one beside a running server.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use ipnet::IpNet;
use rusqlite::types::FromSql;
use rusqlite::{
    Connection, ErrorCode, OptionalExtension as _, Row, ToSql, Transaction, TransactionBehavior,
    params,
};
use time::OffsetDateTime;
use tokio::sync::oneshot;

use super::clock::{now, wall};
use super::files;
use crate::coord::auth_key::AuthKey;
use crate::coord::server::{NodeRecord, Registration, USERS_MAX, Write};
use crate::key::{DiscoPublic, KEY_LEN, MachinePublic, NodePublic};

/// Version of the tables below; a newer file is refused.
const SCHEMA_VERSION: i64 = 2;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS meta (k TEXT PRIMARY KEY, v BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS users (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS authkeys (
    id INTEGER PRIMARY KEY AUTOINCREMENT, prefix TEXT NOT NULL UNIQUE, hash BLOB NOT NULL,
    user_id INTEGER REFERENCES users(id), tags TEXT NOT NULL DEFAULT '[]',
    reusable INTEGER NOT NULL, ephemeral INTEGER NOT NULL, used INTEGER NOT NULL DEFAULT 0,
    expires INTEGER, created INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS nodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    machine_key BLOB NOT NULL, node_key BLOB NOT NULL UNIQUE, disco_key BLOB,
    user_id INTEGER REFERENCES users(id), tags TEXT NOT NULL DEFAULT '[]',
    name TEXT NOT NULL UNIQUE, name_fixed INTEGER NOT NULL DEFAULT 0,
    ipv4 TEXT NOT NULL UNIQUE, ipv6 TEXT NOT NULL UNIQUE,
    capver INTEGER NOT NULL, hostinfo TEXT NOT NULL, endpoints TEXT NOT NULL,
    approved_routes TEXT NOT NULL DEFAULT '[]', authkey_id INTEGER, ephemeral INTEGER NOT NULL,
    expires INTEGER, last_seen INTEGER, created INTEGER NOT NULL, good_until INTEGER);
CREATE UNIQUE INDEX IF NOT EXISTS nodes_owner ON nodes(machine_key, IFNULL(user_id, 0));
CREATE TABLE IF NOT EXISTS policy (
    id INTEGER PRIMARY KEY, body TEXT NOT NULL, created INTEGER NOT NULL);
";

/// How long another process may hold the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The file's content and how to change it. Blocking: [`Store`] has it on a thread of its own.
#[derive(Debug)]
pub struct Database {
    connection: Connection,
}

/// What a server starts from.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// All nodes.
    pub nodes: Vec<NodeRecord>,
    /// The highest node id ever used.
    pub last_id: i64,
    /// The host number given out last.
    pub last_host: u32,
    /// Whether any auth key was ever made.
    pub has_keys: bool,
    /// Names of users.
    pub users: BTreeMap<i64, String>,
}

impl Database {
    /// Opens or makes the file, mode 0600, with the one owner of this version. Others may be doing
    /// the same.
    ///
    /// # Errors
    /// When it cannot be opened, is no database, was made by a newer version, or is held by another
    /// process for 5 s.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        // SQLite gives its side files the mode of the main one.
        files::open(path)?;
        let connection = Connection::open(path);
        let connection = connection.with_context(|| format!("cannot open {}", path.display()))?;
        let deadline = now() + BUSY_TIMEOUT;
        let version = loop {
            match set_up(&connection) {
                // Of two that make a new file, SQLite refuses one at once instead of waiting.
                Err(error)
                    if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                        && now() < deadline =>
                {
                    pause();
                }
                done => break done,
            }
        };
        let version = version.with_context(|| format!("cannot use {}", path.display()))?;
        anyhow::ensure!(
            version == SCHEMA_VERSION,
            "{} was made by another version of ringtail",
            path.display()
        );
        Ok(Self { connection })
    }

    /// Everything a server starts from.
    ///
    /// # Errors
    /// When the file cannot be read or a row makes no sense.
    pub fn load(&self) -> anyhow::Result<Loaded> {
        let mut statement = self.connection.prepare(
            "SELECT id, machine_key, node_key, disco_key, name, ipv4, ipv6, capver, hostinfo,
                    endpoints, authkey_id, ephemeral, expires, last_seen, created,
                    approved_routes, IFNULL(user_id, 1), tags, name_fixed, good_until
             FROM nodes ORDER BY id",
        )?;
        let nodes = statement.query_map([], |row| Ok(node_of(row)))?;
        let nodes = nodes.collect::<Result<Result<Vec<_>, _>, _>>()??;
        let number = |sql| anyhow::Ok(self.value(sql)?.unwrap_or(0));
        Ok(Loaded {
            nodes,
            last_id: number("SELECT seq FROM sqlite_sequence WHERE name = 'nodes'")?,
            last_host: u32::try_from(number("SELECT v FROM meta WHERE k = 'next_ip'")?)?,
            has_keys: number("SELECT COUNT(*) FROM authkeys")? > 0,
            users: self.users()?,
        })
    }

    /// Names of users, by id.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn users(&self) -> anyhow::Result<BTreeMap<i64, String>> {
        let mut statement = self.connection.prepare("SELECT id, name FROM users")?;
        let users = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(users.collect::<Result<_, _>>()?)
    }

    /// Adds a user; false when there is one of that name.
    ///
    /// # Errors
    /// When the file cannot be written, or there are [`USERS_MAX`].
    pub fn add_user(&self, name: &str, now: OffsetDateTime) -> anyhow::Result<bool> {
        anyhow::ensure!(
            self.users()?.len() < USERS_MAX,
            "there are {USERS_MAX} users, and no more can be"
        );
        let rows = self.connection.execute(
            "INSERT OR IGNORE INTO users (name, created) VALUES (?1, ?2)",
            params![name, now.unix_timestamp()],
        )?;
        Ok(rows == 1)
    }

    /// The nodes that were connected when a server wrote last; true only while it runs.
    ///
    /// # Errors
    /// When the file cannot be read or the entry makes no sense.
    pub fn online(&self) -> anyhow::Result<Vec<i64>> {
        let text: Option<String> = self.value("SELECT v FROM meta WHERE k = 'online'")?;
        let online = text.map(|text| serde_json::from_str(&text)).transpose()?;
        Ok(online.unwrap_or_default())
    }

    fn value<T: FromSql>(&self, sql: &str) -> rusqlite::Result<Option<T>> {
        let found = self.connection.query_row(sql, [], |row| row.get(0));
        Ok(found.optional()?.flatten())
    }

    /// The auth key stored under a name.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn find_key(&self, name: &str) -> anyhow::Result<Option<AuthKey>> {
        let sql = format!("{KEY_COLUMNS} WHERE prefix = ?1");
        let found = self
            .connection
            .query_row(&sql, [name], |row| Ok(key_of(row)));
        found.optional()?.transpose()
    }

    /// All auth keys, oldest first.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn keys(&self) -> anyhow::Result<Vec<AuthKey>> {
        let mut statement = self
            .connection
            .prepare(&format!("{KEY_COLUMNS} ORDER BY id"))?;
        let keys = statement.query_map([], |row| Ok(key_of(row)))?;
        keys.collect::<Result<Result<Vec<_>, _>, _>>()?
    }

    /// Stores an auth key (its `id` is not looked at), or renews the one of the same name.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put_key(&self, key: &AuthKey) -> anyhow::Result<()> {
        self.connection.execute(
            "INSERT INTO authkeys (prefix, hash, reusable, ephemeral, used, expires, created,
                                   user_id, tags)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
             ON CONFLICT (prefix) DO UPDATE SET hash = excluded.hash,
                 reusable = excluded.reusable, ephemeral = excluded.ephemeral,
                 expires = excluded.expires",
            params![
                key.name,
                key.hash,
                key.reusable,
                key.ephemeral,
                key.used,
                key.expires.map(OffsetDateTime::unix_timestamp),
                key.created.unix_timestamp(),
                key.user,
                serde_json::to_string(&key.tags)?,
            ],
        )?;
        Ok(())
    }

    /// Makes an auth key worthless; whether there is one of that name.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn expire_key(&self, name: &str, now: OffsetDateTime) -> anyhow::Result<bool> {
        let rows = self.connection.execute(
            "UPDATE authkeys SET expires = ?2 WHERE prefix = ?1",
            params![name, now.unix_timestamp()],
        )?;
        Ok(rows == 1)
    }

    /// Commits a registration, auth key and node in one transaction; false, with nothing done,
    /// when the key is used up by now. `host` is the number behind a new node's address.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn commit(&mut self, registration: &Registration, host: u32) -> anyhow::Result<bool> {
        let transaction = self.connection.transaction()?;
        let key = match registration {
            Registration::Answer(_) | Registration::Pending(_) => return Ok(true),
            Registration::Insert(record, key) => {
                save(&transaction, record)?;
                put_meta(&transaction, "next_ip", host)?;
                *key
            }
            Registration::Rekey(record, key) => {
                save(&transaction, record)?;
                *key
            }
            Registration::Expire(record) => {
                save(&transaction, record)?;
                None
            }
            Registration::Delete(id) => {
                transaction.execute("DELETE FROM nodes WHERE id = ?1", [id])?;
                None
            }
        };
        if let Some(key) = key {
            let taken = transaction.execute(
                "UPDATE authkeys SET used = 1 WHERE id = ?1 AND (reusable OR NOT used)",
                [key],
            )?;
            if taken != 1 {
                return Ok(false);
            }
        }
        transaction.commit()?;
        Ok(true)
    }

    /// Writes what was collected.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&mut self, writes: &[Write]) -> anyhow::Result<()> {
        let transaction = self.connection.transaction()?;
        // Names may have moved between nodes: free them all before the new ones are written.
        for write in writes {
            if let Write::Save(record) = write {
                transaction.execute(
                    "UPDATE nodes SET name = '~' || id WHERE id = ?1",
                    [record.id],
                )?;
            }
        }
        for write in writes {
            match write {
                Write::Save(record) => save(&transaction, record)?,
                Write::Delete(id) => {
                    transaction.execute("DELETE FROM nodes WHERE id = ?1", [id])?;
                }
                Write::Online(ids) => {
                    put_meta(&transaction, "online", serde_json::to_string(ids)?)?;
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

const KEY_COLUMNS: &str = "SELECT id, prefix, hash, reusable, ephemeral, used, expires, created,
                                  IFNULL(user_id, 1), tags
                           FROM authkeys";

/// Makes the tables where they are missing, any number of times; gives the version of the schema.
fn set_up(connection: &Connection) -> rusqlite::Result<i64> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.execute_batch(SCHEMA)?;
    connection.execute(
        "INSERT OR IGNORE INTO meta (k, v) VALUES ('schema', ?1)",
        [SCHEMA_VERSION],
    )?;
    connection.execute(
        "INSERT OR IGNORE INTO users (id, name, created) VALUES (1, 'ringtail', ?1)",
        [wall().unix_timestamp()],
    )?;
    let version = |connection: &Connection| {
        connection.query_row("SELECT v FROM meta WHERE k = 'schema'", [], |row| {
            row.get::<_, i64>(0)
        })
    };
    if version(connection)? == 1 {
        // Of two that do this, one waits, and finds it done.
        let lock = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
        if version(&lock)? == 1 {
            lock.execute_batch(
                "ALTER TABLE nodes ADD COLUMN good_until INTEGER;
                 UPDATE meta SET v = 2 WHERE k = 'schema';",
            )?;
        }
        lock.commit()?;
    }
    version(connection)
}

#[expect(clippy::disallowed_methods, reason = "a blocking driver's pause")]
pub(super) fn pause() {
    std::thread::sleep(Duration::from_millis(10));
}

fn put_meta(
    transaction: &Transaction<'_>,
    name: &str,
    value: impl ToSql,
) -> rusqlite::Result<usize> {
    transaction.execute(
        "INSERT INTO meta (k, v) VALUES (?1, ?2) ON CONFLICT (k) DO UPDATE SET v = excluded.v",
        params![name, value],
    )
}

fn save(transaction: &Transaction<'_>, record: &NodeRecord) -> anyhow::Result<()> {
    transaction.execute(
        "INSERT INTO nodes (id, machine_key, node_key, disco_key, name, ipv4, ipv6,
                            capver, hostinfo, endpoints, authkey_id, ephemeral, expires,
                            last_seen, created, approved_routes, user_id, tags, name_fixed,
                            good_until)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18,
                 ?19, ?20)
         ON CONFLICT (id) DO UPDATE SET node_key = excluded.node_key,
             disco_key = excluded.disco_key, name = excluded.name, capver = excluded.capver,
             hostinfo = excluded.hostinfo, endpoints = excluded.endpoints,
             authkey_id = excluded.authkey_id, ephemeral = excluded.ephemeral,
             expires = excluded.expires, last_seen = excluded.last_seen,
             approved_routes = excluded.approved_routes, user_id = excluded.user_id,
             tags = excluded.tags, name_fixed = excluded.name_fixed,
             good_until = excluded.good_until",
        params![
            record.id,
            record.machine.0,
            record.node_key.0,
            record.disco.map(|key| key.0),
            record.name,
            record.v4.to_string(),
            record.v6.to_string(),
            record.capver,
            record.hostinfo.to_string(),
            serde_json::to_string(&record.endpoints)?,
            record.auth_key,
            record.ephemeral,
            record.expires.map(OffsetDateTime::unix_timestamp),
            record.last_seen.map(OffsetDateTime::unix_timestamp),
            record.created.unix_timestamp(),
            serde_json::to_string(&record.approved)?,
            record.user,
            serde_json::to_string(&record.tags)?,
            record.name_fixed,
            record.good_until.map(OffsetDateTime::unix_timestamp),
        ],
    )?;
    Ok(())
}

fn time_of(seconds: i64) -> anyhow::Result<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(seconds).context("a time out of range")
}

fn key_of(row: &Row<'_>) -> anyhow::Result<AuthKey> {
    let expires: Option<i64> = row.get(6)?;
    Ok(AuthKey {
        id: row.get(0)?,
        name: row.get(1)?,
        hash: row.get(2)?,
        reusable: row.get(3)?,
        ephemeral: row.get(4)?,
        used: row.get(5)?,
        expires: expires.map(time_of).transpose()?,
        created: time_of(row.get(7)?)?,
        user: row.get(8)?,
        tags: serde_json::from_str(&row.get::<_, String>(9)?)?,
    })
}

fn node_of(row: &Row<'_>) -> anyhow::Result<NodeRecord> {
    let disco: Option<[u8; KEY_LEN]> = row.get(3)?;
    let (v4, v6): (String, String) = (row.get(5)?, row.get(6)?);
    let (hostinfo, endpoints): (String, String) = (row.get(8)?, row.get(9)?);
    let endpoints: Vec<SocketAddr> = serde_json::from_str(&endpoints)?;
    let approved: String = row.get(15)?;
    let mut approved: Vec<IpNet> = serde_json::from_str(&approved)?;
    approved.sort_unstable();
    let expires: Option<i64> = row.get(12)?;
    let last_seen: Option<i64> = row.get(13)?;
    let good_until: Option<i64> = row.get(19)?;
    Ok(NodeRecord {
        id: row.get(0)?,
        machine: MachinePublic(row.get(1)?),
        node_key: NodePublic(row.get(2)?),
        disco: disco.map(DiscoPublic),
        user: row.get(16)?,
        tags: serde_json::from_str(&row.get::<_, String>(17)?)?,
        name: row.get(4)?,
        name_fixed: row.get(18)?,
        v4: v4.parse()?,
        v6: v6.parse()?,
        capver: row.get(7)?,
        hostinfo: serde_json::from_str(&hostinfo)?,
        endpoints,
        auth_key: row.get(10)?,
        ephemeral: row.get(11)?,
        expires: expires.map(time_of).transpose()?,
        good_until: good_until.map(time_of).transpose()?,
        approved,
        last_seen: last_seen.map(time_of).transpose()?,
        created: time_of(row.get(14)?)?,
    })
}

type Job = Box<dyn FnOnce(&mut Database) + Send>;

/// A [`Database`] on its own thread. The one task that uses it waits for every answer, so its
/// queue never grows.
#[derive(Debug)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
}

impl Store {
    /// Starts the thread; it ends when the store is dropped and everything asked is done.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(mut database: Database) -> anyhow::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("rt-coord-store".to_owned())
            .spawn(move || {
                for job in queue {
                    job(&mut database);
                }
            })
            .context("cannot start the store's thread")?;
        Ok(Self { jobs })
    }

    /// Runs something on the store's thread and gives its result.
    ///
    /// # Errors
    /// What it gives, or that the thread is gone.
    pub async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Database) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let (answer, result) = oneshot::channel();
        let job = move |database: &mut Database| {
            // Nobody waits any more when the asker is gone: the work is done all the same.
            let _ = answer.send(work(database));
        };
        let gone = || anyhow!("the store's thread is gone");
        self.jobs.send(Box::new(job)).map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coord::auth_key;
    use serde_json::json;

    const NOW: OffsetDateTime = time::macros::datetime!(2026-11-22 05:00 UTC);

    fn record(id: u8) -> NodeRecord {
        NodeRecord {
            id: i64::from(id),
            machine: MachinePublic([id; 32]),
            node_key: NodePublic([id; 32]),
            disco: Some(DiscoPublic([id; 32])),
            user: 1,
            tags: Vec::new(),
            name: format!("n{id}"),
            name_fixed: false,
            v4: [100, 64, 0, id].into(),
            v6: std::net::Ipv6Addr::from_bits(u128::from(id)),
            capver: 130,
            hostinfo: json!({"Hostname": "h", "NetInfo": {"PreferredDERP": 900}}),
            endpoints: vec!["192.0.2.1:41641".parse().unwrap()],
            auth_key: Some(1),
            ephemeral: false,
            expires: None,
            good_until: None,
            approved: vec!["10.20.0.0/16".parse().unwrap()],
            last_seen: Some(NOW),
            created: NOW,
        }
    }

    fn key(text: &str, reusable: bool) -> AuthKey {
        AuthKey {
            id: 0,
            name: auth_key::name(text),
            hash: auth_key::hash(text),
            reusable,
            ephemeral: false,
            user: 1,
            tags: Vec::new(),
            used: false,
            expires: None,
            created: NOW,
        }
    }

    #[test]
    fn what_was_committed_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coord.db");
        let mut database = Database::open(&path).unwrap();
        assert!(!database.load().unwrap().has_keys);
        database.put_key(&key("k", true)).unwrap();
        let id = database.find_key(&auth_key::name("k")).unwrap().unwrap().id;
        for n in [1, 2] {
            let insert = Registration::Insert(Box::new(record(n)), Some(id));
            assert!(database.commit(&insert, u32::from(n)).unwrap());
        }
        let mut changed = record(2);
        changed.endpoints.clear();
        changed.expires = Some(NOW);
        let writes = [Write::Delete(1), Write::Save(Box::new(changed.clone()))];
        database.write(&writes).unwrap();
        let mut swapped = [record(3), record(4)];
        for record in &swapped {
            let insert = Registration::Insert(Box::new(record.clone()), Some(id));
            assert!(database.commit(&insert, 2).unwrap());
        }
        let names = (swapped[0].name.clone(), swapped[1].name.clone());
        (swapped[1].name, swapped[0].name) = names;
        let writes = swapped.clone().map(|record| Write::Save(Box::new(record)));
        database.write(&writes).unwrap();
        // No clean close: what a killed process leaves.
        std::mem::forget(database);
        let loaded = Database::open(&path).unwrap().load().unwrap();
        let [third, fourth] = swapped;
        assert_eq!(loaded.nodes, [changed, third, fourth]);
        assert_eq!((loaded.last_id, loaded.last_host), (4, 2));
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_single_use_key_lets_one_node_in_even_when_two_were_told_it_is_good() {
        let dir = tempfile::tempdir().unwrap();
        let mut database = Database::open(&dir.path().join("coord.db")).unwrap();
        database.put_key(&key("once", false)).unwrap();
        let id = database.keys().unwrap()[0].id;
        let first = Registration::Insert(Box::new(record(1)), Some(id));
        let second = Registration::Insert(Box::new(record(2)), Some(id));
        assert!(database.commit(&first, 1).unwrap());
        assert!(!database.commit(&second, 2).unwrap());
        let loaded = database.load().unwrap();
        assert_eq!((loaded.nodes.len(), loaded.last_host), (1, 1));
        assert!(database.expire_key(&auth_key::name("once"), NOW).unwrap());
        assert!(!database.expire_key("nobody", NOW).unwrap());
    }

    /// As a version wrote it that approved routes for all nodes, on its command line.
    #[test]
    fn a_file_from_before_approvals_were_kept_is_read_and_nothing_is_approved_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coord.db");
        Database::open(&path).unwrap();
        let old = Connection::open(&path).unwrap();
        old.execute(
            "INSERT INTO nodes (machine_key, node_key, user_id, name, ipv4, ipv6, capver, hostinfo,
                                endpoints, ephemeral, created)
             VALUES (?1, ?1, 1, 'router', '100.64.0.1', 'fd7a:115c:a1e0::1', 130, ?2, '[]', 0, 1)",
            params![[7_u8; 32], r#"{"RoutableIPs":["10.20.0.0/16"]}"#],
        )
        .unwrap();
        drop(old);
        let mut database = Database::open(&path).unwrap();
        let mut node = database.load().unwrap().nodes.remove(0);
        assert_eq!(node.approved, []);
        node.approved = vec!["10.20.0.0/16".parse().unwrap(), "::/0".parse().unwrap()];
        database
            .write(&[Write::Save(Box::new(node.clone()))])
            .unwrap();
        let loaded = Database::open(&path).unwrap().load().unwrap().nodes;
        assert_eq!(loaded, [node]);
    }

    #[test]
    fn a_file_of_the_version_before_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coord.db");
        let mut database = Database::open(&path).unwrap();
        let mut node = record(1);
        database
            .write(&[Write::Save(Box::new(node.clone()))])
            .unwrap();
        let before = "ALTER TABLE nodes DROP COLUMN good_until;
                      UPDATE meta SET v = 1 WHERE k = 'schema'";
        database.connection.execute_batch(before).unwrap();
        drop(database);
        let mut database = Database::open(&path).unwrap();
        assert_eq!(database.load().unwrap().nodes, [node.clone()]);
        node.good_until = Some(NOW);
        node.tags = vec!["tag:web".to_owned()];
        (node.user, node.name_fixed) = (2, true);
        assert!(database.add_user("ann", NOW).unwrap() && !database.add_user("ann", NOW).unwrap());
        database
            .write(&[Write::Save(Box::new(node.clone()))])
            .unwrap();
        let loaded = Database::open(&path).unwrap().load().unwrap();
        assert_eq!(
            (&loaded.nodes[..], &loaded.users[&2][..]),
            (&[node][..], "ann")
        );
    }

    #[test]
    fn a_file_of_another_version_or_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coord.db");
        let database = Database::open(&path).unwrap();
        database
            .connection
            .execute("UPDATE meta SET v = 3 WHERE k = 'schema'", [])
            .unwrap();
        drop(database);
        assert!(Database::open(&path).is_err());
        std::fs::write(
            &path,
            b"this is no database, and long enough to be read as one",
        )
        .unwrap();
        assert!(Database::open(&path).is_err());
    }
}
