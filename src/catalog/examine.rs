//! A look at a database from outside: no lock is taken, nothing is made, changed or moved.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags};

use super::{OpenError, sqlite};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examined {
    /// Its schema.
    pub schema: i64,
    /// The newest schema that this program knows.
    pub known_schema: i64,
    /// What SQLite's own quick check complains of; empty when all is well.
    pub problems: Vec<String>,
}

/// Reads the schema's number and runs SQLite's quick check, which reads the whole file.
///
/// # Errors
/// What is no database, can't be read, is another program's or of a newer version of this one.
pub fn examine(path: &Path) -> Result<Examined, OpenError> {
    let sqlite = |cause| sqlite::refused(path, cause);
    let db = open(path).map_err(sqlite)?;
    let schema = sqlite::schema_version(&db, path)?;
    if schema == 0 && !sqlite::is_empty(&db).map_err(sqlite)? {
        return Err(OpenError::NotOurs { path: path.to_owned() });
    }
    let lines = |db: &Connection| {
        let mut check = db.prepare("PRAGMA quick_check(10)")?;
        check.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<Vec<String>>>()
    };
    let mut problems = lines(&db).map_err(sqlite)?;
    problems.retain(|line| line != "ok");
    Ok(Examined { schema, known_schema: sqlite::known_schema(), problems })
}

/// Opens it so that SQLite makes no file beside it: one that belongs to whoever looks, such as root, would keep the
/// service out.
fn open(path: &Path) -> rusqlite::Result<Connection> {
    let beside = |suffix: &str| PathBuf::from(format!("{}{suffix}", path.display())).exists();
    if beside("-wal") && beside("-shm") {
        return Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        );
    }
    // Nobody is at work in it (or only its main file was copied), so it can be read as if it were never to change.
    let mut url = url::Url::from_file_path(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
        .map_err(|()| rusqlite::Error::InvalidPath(path.to_owned()))?;
    url.set_query(Some("immutable=1"));
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    Connection::open_with_flags(url.as_str(), flags)
}
