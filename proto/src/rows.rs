//! Typed rows over bytes: a schema, rows that keep to it, ranges of ids that are shards, and what inserting, updating,
//! removing and ranging are as operations of a keyspace. Pure. It knows neither JSON nor HTTP, and asks nobody.
//!
//! A row is stored under its id, eight bytes in big-endian, so that the order of the keys is the order of the ids. A value
//! is stored and given back as it was received: a number in a column of type String stays a number.

use crate::map::Part;
use crate::message::Condition;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// First byte of every stored row.
const FORMAT: u8 = 1;
/// Most columns of a schema.
pub const COLUMNS_MAX: usize = 64;
/// Most bytes in the name of a column or of a shard.
pub const NAME_BYTES_MAX: usize = 128;
/// The highest id.
pub const ID_MAX: u64 = i64::MAX as u64;

/// Why rows, ranges or a schema are refused. Each names what it is about.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RowsError {
    /// The schema contradicts itself.
    #[error("schema: {0}")]
    Schema(String),
    /// A row breaks the schema.
    #[error("{0}")]
    Row(String),
    /// A range is empty or beyond the highest id.
    #[error("shard {name}: {why}")]
    Range {
        /// The shard.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Two shards of one name.
    #[error("duplicate shard id {0}")]
    DuplicateShard(String),
    /// Two shards hold the same ids.
    #[error("shards {0} and {1} overlap")]
    Overlap(String, String),
    /// Ids between two shards that neither holds: no row could ever be put there.
    #[error("shards {0} and {1} leave a gap: the first ends before {2}, the second begins at {3}")]
    Gap(String, String, u64, u64),
    /// An id that no shard holds.
    #[error("no shard holds {column} {id}")]
    Nowhere {
        /// The key's column.
        column: String,
        /// The id.
        id: u64,
    },
    /// The same id twice in one request.
    #[error("{column} {id} is there twice, at items {first} and {second}")]
    Twice {
        /// The key's column.
        column: String,
        /// The id.
        id: u64,
        /// Where it is first, from 0.
        first: usize,
        /// Where it is again.
        second: usize,
    },
    /// Bytes that are no row of this schema.
    #[error("a stored row cannot be read: {0}")]
    Stored(&'static str),
}

// ---------------------------------------------------------------------------------------------- schema and rows

/// What a column is declared to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Dtype {
    /// An integer.
    Number,
    /// A text; a number is taken as well, and stays one.
    String,
    /// A number.
    Float,
}

/// The columns of a table. The key's column is one of them and a [`Dtype::Number`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Schema {
    columns: Vec<String>,
    dtypes: Vec<Dtype>,
    key: u32,
}

impl Schema {
    /// A schema whose rows are found by the column `key`.
    ///
    /// # Errors
    /// [`RowsError::Schema`].
    pub fn new(columns: Vec<String>, dtypes: Vec<Dtype>, key: &str) -> Result<Self, RowsError> {
        let wrong = |why: String| Err(RowsError::Schema(why));
        if columns.len() != dtypes.len() {
            return wrong(format!("{} columns and {} dtypes", columns.len(), dtypes.len()));
        }
        if columns.is_empty() || columns.len() > COLUMNS_MAX {
            return wrong(format!("{} columns; 1 to {COLUMNS_MAX} can be", columns.len()));
        }
        let mut seen = BTreeSet::new();
        for column in &columns {
            if column.is_empty() || column.len() > NAME_BYTES_MAX {
                return wrong(format!("the name of a column has 1 to {NAME_BYTES_MAX} bytes, {column:?} has not"));
            }
            if !seen.insert(column) {
                return wrong(format!("the column {column} is named twice"));
            }
        }
        let Some(at) = columns.iter().position(|column| column == key) else {
            return wrong(format!("the key's column {key} is missing"));
        };
        if dtypes[at] != Dtype::Number {
            return wrong(format!("the key's column {key} must be a Number"));
        }
        Ok(Self { columns, dtypes, key: at as u32 })
    }

    /// The names of the columns.
    #[must_use]
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// The types of the columns.
    #[must_use]
    pub fn dtypes(&self) -> &[Dtype] {
        &self.dtypes
    }

    /// The name of the key's column.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.columns[self.key as usize]
    }

    /// A row of these named values: each column once, and no other.
    ///
    /// # Errors
    /// [`RowsError::Row`] names the column.
    pub fn row(&self, mut named: BTreeMap<String, Value>) -> Result<Row, RowsError> {
        let mut values = Vec::with_capacity(self.columns.len());
        for (column, dtype) in self.columns.iter().zip(&self.dtypes) {
            let value = named.remove(column).ok_or_else(|| RowsError::Row(format!("{column} is missing")))?;
            values.push(if column == self.key() {
                Value::Integer(value.as_id().map_err(|why| RowsError::Row(format!("{column}: {why}")))? as i64)
            } else {
                value.check(*dtype).map_err(|why| RowsError::Row(format!("{column}: {why}")))?;
                value
            });
        }
        match named.keys().next() {
            Some(other) => Err(RowsError::Row(format!("{other} is no column"))),
            None => Ok(Row(values)),
        }
    }

    /// The id of a row of this schema.
    #[must_use]
    pub fn id_of(&self, row: &Row) -> u64 {
        match row.0.get(self.key as usize) {
            Some(Value::Integer(id)) => *id as u64, // rows are made by `row` and `decode` only, which see to it
            _ => 0,
        }
    }

    /// A row as it is stored.
    #[must_use]
    pub fn encode(&self, row: &Row) -> Vec<u8> {
        let mut bytes = vec![FORMAT];
        for value in &row.0 {
            match value {
                Value::Integer(n) => {
                    bytes.push(0);
                    bytes.extend_from_slice(&n.to_le_bytes());
                }
                Value::Float(n) => {
                    bytes.push(1);
                    bytes.extend_from_slice(&n.to_bits().to_le_bytes());
                }
                Value::Text(text) => {
                    bytes.push(2);
                    bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
                    bytes.extend_from_slice(text.as_bytes());
                }
            }
        }
        bytes
    }

    /// A row from what is stored.
    ///
    /// # Errors
    /// [`RowsError::Stored`].
    pub fn decode(&self, mut bytes: &[u8]) -> Result<Row, RowsError> {
        fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], RowsError> {
            let (front, rest) = bytes.split_at_checked(count).ok_or(RowsError::Stored("it is cut off"))?;
            *bytes = rest;
            Ok(front)
        }
        fn eight(bytes: &mut &[u8]) -> Result<[u8; 8], RowsError> {
            take(bytes, 8)?.try_into().map_err(|_| RowsError::Stored("it is cut off"))
        }
        if take(&mut bytes, 1)? != [FORMAT] {
            return Err(RowsError::Stored("its format is unknown"));
        }
        let mut values = Vec::with_capacity(self.columns.len());
        for _ in &self.columns {
            values.push(match take(&mut bytes, 1)? {
                [0] => Value::Integer(i64::from_le_bytes(eight(&mut bytes)?)),
                [1] => Value::Float(f64::from_bits(u64::from_le_bytes(eight(&mut bytes)?))),
                [2] => {
                    let count = take(&mut bytes, 4)?.try_into().map_err(|_| RowsError::Stored("it is cut off"))?;
                    let text = take(&mut bytes, u32::from_le_bytes(count) as usize)?;
                    Value::Text(String::from_utf8(text.to_vec()).map_err(|_| RowsError::Stored("its text is no text"))?)
                }
                _ => return Err(RowsError::Stored("it has a value of an unknown kind")),
            });
        }
        if !bytes.is_empty() {
            return Err(RowsError::Stored("it is longer than its columns"));
        }
        match values[self.key as usize] {
            Value::Integer(0..) => Ok(Row(values)),
            _ => Err(RowsError::Stored("its key is no id")),
        }
    }
}

/// A value of a row.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// An integer.
    Integer(i64),
    /// A number with a fraction or an exponent.
    Float(f64),
    /// A text.
    Text(String),
}

impl Value {
    /// The id that it is: an integer from 0 to [`ID_MAX`], or a text that reads as one.
    ///
    /// # Errors
    /// What it is instead.
    pub fn as_id(&self) -> Result<u64, String> {
        match self {
            Self::Integer(id @ 0..) => Ok(*id as u64),
            Self::Text(text) => match text.parse::<u64>() {
                Ok(id) if id <= ID_MAX => Ok(id),
                _ => Err(format!("{text:?} is no id: an integer from 0 to {ID_MAX} is")),
            },
            other => Err(format!("{other} is no id: an integer from 0 to {ID_MAX} is")),
        }
    }

    fn check(&self, dtype: Dtype) -> Result<(), String> {
        match (dtype, self) {
            (Dtype::Number, Self::Integer(_))
            | (Dtype::String, Self::Text(_) | Self::Integer(_) | Self::Float(_))
            | (Dtype::Float, Self::Float(_) | Self::Integer(_)) => Ok(()),
            (Dtype::Number, Self::Float(_) | Self::Text(_)) | (Dtype::Float, Self::Text(_)) => {
                Err(format!("{self} is no {dtype:?}"))
            }
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(n) => write!(f, "{n}"),
            Self::Float(n) => write!(f, "{n}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Integer(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl Serialize for Value {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Integer(n) => serializer.serialize_i64(*n),
            Self::Float(n) => serializer.serialize_f64(*n),
            Self::Text(text) => serializer.serialize_str(text),
        }
    }
}

/// A row that keeps to its schema, its values in the order of the columns.
#[derive(Clone, PartialEq, Debug)]
pub struct Row(Vec<Value>);

impl Row {
    /// Its values.
    #[must_use]
    pub fn values(&self) -> &[Value] {
        &self.0
    }

    /// Its values by name.
    #[must_use]
    pub fn named(&self, schema: &Schema) -> BTreeMap<String, Value> {
        schema.columns.iter().cloned().zip(self.0.iter().cloned()).collect()
    }
}

// ---------------------------------------------------------------------------------------------- keys and ranges

/// The key of an id.
#[must_use]
pub fn key_of(id: u64) -> [u8; 8] {
    id.to_be_bytes()
}

/// The id of a key.
#[must_use]
pub fn id_of(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
}

/// A named range of ids, from `low` up to but not including `low + size`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RangeShard {
    /// Its name.
    pub name: String,
    /// Its first id.
    pub low: u64,
    /// How many ids it has.
    pub size: u64,
}

impl RangeShard {
    /// The first id beyond it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.low.saturating_add(self.size)
    }

    /// Whether it holds an id.
    #[must_use]
    pub fn holds(&self, id: u64) -> bool {
        (self.low..self.end()).contains(&id)
    }

    /// Its part of the keyspace.
    #[must_use]
    pub fn part(&self) -> Part {
        Part::Range { start: key_of(self.low).to_vec(), end: Some(key_of(self.end()).to_vec()) }
    }
}

/// Ranges that neither overlap nor leave a gap, in the order of their ids. Ids below the first and beyond the last are
/// nobody's.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Shards(Vec<RangeShard>);

impl Shards {
    /// Takes ranges in any order.
    ///
    /// # Errors
    /// Names the shard that is empty, is there twice, or leaves the ids, and the two that overlap or leave a gap.
    pub fn new(mut shards: Vec<RangeShard>) -> Result<Self, RowsError> {
        let mut names = BTreeSet::new();
        for shard in &shards {
            let wrong = |why: &str| Err(RowsError::Range { name: shard.name.clone(), why: why.into() });
            if shard.name.is_empty() || shard.name.len() > NAME_BYTES_MAX {
                return wrong(&format!("its name must have 1 to {NAME_BYTES_MAX} bytes"));
            }
            if !names.insert(&shard.name) {
                return Err(RowsError::DuplicateShard(shard.name.clone()));
            }
            if shard.size == 0 {
                return wrong("its size is 0");
            }
            if shard.low.checked_add(shard.size).is_none_or(|end| end > ID_MAX) {
                return wrong("it leaves the range of ids");
            }
        }
        shards.sort_by_key(|shard| shard.low);
        for pair in shards.windows(2) {
            let (first, second) = (pair[0].name.clone(), pair[1].name.clone());
            match pair[1].low.cmp(&pair[0].end()) {
                Ordering::Less => return Err(RowsError::Overlap(first, second)),
                Ordering::Equal => {}
                Ordering::Greater => return Err(RowsError::Gap(first, second, pair[0].end(), pair[1].low)),
            }
        }
        Ok(Self(shards))
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &RangeShard> {
        self.0.iter()
    }

    /// The shard of this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<&RangeShard> {
        self.0.iter().find(|shard| shard.name == name)
    }

    /// The shard that holds an id.
    #[must_use]
    pub fn holding(&self, id: u64) -> Option<&RangeShard> {
        let after = self.0.partition_point(|shard| shard.low <= id);
        self.0[..after].last().filter(|shard| shard.holds(id))
    }

    /// The shards that hold ids from `low` to `high`, both included, each with the part of that range that it holds.
    pub fn touched(&self, low: u64, high: u64) -> impl Iterator<Item = (&RangeShard, u64, u64)> {
        self.0.iter().filter_map(move |shard| {
            let (from, to) = (shard.low.max(low), (shard.end() - 1).min(high));
            (from <= to).then_some((shard, from, to))
        })
    }

    /// Parts that cover all keys: those of the shards, and of the ids before and behind them that nobody has yet.
    #[must_use]
    pub fn parts(&self) -> Vec<(Part, Option<&RangeShard>)> {
        self.cover(Vec::new(), None)
    }

    /// The same for a part only, which no shard leaves.
    #[must_use]
    pub fn cover(&self, start: Vec<u8>, end: Option<Vec<u8>>) -> Vec<(Part, Option<&RangeShard>)> {
        let mut parts = Vec::new();
        let mut at = start;
        for shard in &self.0 {
            let (low, beyond) = (key_of(shard.low).to_vec(), key_of(shard.end()).to_vec());
            // What precedes the key of 0 is no id: the first shard takes it, so that nobody else has to.
            if shard.low == 0 {
                parts.push((Part::Range { start: at, end: Some(beyond.clone()) }, Some(shard)));
            } else {
                if at < low {
                    parts.push((Part::Range { start: at, end: Some(low.clone()) }, None));
                }
                parts.push((Part::Range { start: low, end: Some(beyond.clone()) }, Some(shard)));
            }
            at = beyond;
        }
        if end.as_ref().is_none_or(|end| at < *end) {
            parts.push((Part::Range { start: at, end }, None));
        }
        parts
    }
}

// ---------------------------------------------------------------------------------------------- operations

/// A change of one row, as an operation of a batch.
#[derive(Clone, PartialEq, Debug)]
pub struct RowWrite {
    /// Its key.
    pub key: [u8; 8],
    /// The row, or nothing if it is to go.
    pub value: Option<Vec<u8>>,
    /// What must hold before.
    pub condition: Condition<'static>,
}

/// Inserts rows: each where a shard of `shards` holds it (or anywhere without), and where no row is yet.
///
/// # Errors
/// [`RowsError::Nowhere`], [`RowsError::Twice`].
pub fn inserts(schema: &Schema, shards: Option<&Shards>, rows: &[Row]) -> Result<Vec<RowWrite>, RowsError> {
    let column = || schema.key().to_owned();
    let mut seen: BTreeMap<u64, usize> = BTreeMap::new();
    let mut writes = Vec::with_capacity(rows.len());
    for (at, row) in rows.iter().enumerate() {
        let id = schema.id_of(row);
        if shards.is_some_and(|shards| shards.holding(id).is_none()) {
            return Err(RowsError::Nowhere { column: column(), id });
        }
        if let Some(first) = seen.insert(id, at) {
            return Err(RowsError::Twice { column: column(), id, first, second: at });
        }
        writes.push(RowWrite { key: key_of(id), value: Some(schema.encode(row)), condition: Condition::Absent });
    }
    Ok(writes)
}

/// Updates a row that must be there.
#[must_use]
pub fn update(schema: &Schema, row: &Row) -> RowWrite {
    RowWrite { key: key_of(schema.id_of(row)), value: Some(schema.encode(row)), condition: Condition::Present }
}

/// Removes a row that must be there.
#[must_use]
pub fn removal(id: u64) -> RowWrite {
    RowWrite { key: key_of(id), value: None, condition: Condition::Present }
}

/// The keys of the ids from `low` to `high`, both included, as the start and the end of a scan.
#[must_use]
pub fn span(low: u64, high: u64) -> (Vec<u8>, Option<Vec<u8>>) {
    (key_of(low).to_vec(), high.checked_add(1).map(|end| key_of(end).to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> Schema {
        let columns = ["Stud_id", "Stud_name", "Stud_marks", "Mean"].map(String::from).to_vec();
        let dtypes = vec![Dtype::Number, Dtype::String, Dtype::String, Dtype::Float];
        Schema::new(columns, dtypes, "Stud_id").unwrap()
    }

    fn named(id: Value, marks: Value, mean: Value) -> BTreeMap<String, Value> {
        let name = Value::Text("Ann".into());
        [("Stud_id", id), ("Stud_name", name), ("Stud_marks", marks), ("Mean", mean)]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }

    fn shard(name: &str, low: u64, size: u64) -> RangeShard {
        RangeShard { name: name.into(), low, size }
    }

    #[test]
    fn values_come_back_as_they_were_given() {
        let schema = schema();
        for (marks, mean) in [
            (Value::Integer(27), Value::Float(0.5)),
            (Value::Text("27".into()), Value::Integer(-3)),
            (Value::Float(2.5e300), Value::Float(f64::MIN_POSITIVE)),
            (Value::Text("ü\0".into()), Value::Integer(i64::MIN)),
        ] {
            let row = schema.row(named(Value::Integer(7), marks.clone(), mean.clone())).unwrap();
            let back = schema.decode(&schema.encode(&row)).unwrap();
            assert_eq!(back, row);
            assert_eq!((&back.values()[2], &back.values()[3]), (&marks, &mean));
            assert_eq!(schema.id_of(&back), 7);
        }
    }

    #[test]
    fn rows_that_break_the_schema_are_refused_by_the_columns_name() {
        let (schema, one) = (schema(), || Value::Integer(1));
        let refused = |row: BTreeMap<String, Value>| schema.row(row).unwrap_err().to_string();
        assert!(refused(named(Value::Integer(-1), one(), one())).starts_with("Stud_id: -1"));
        assert!(refused(named(Value::Text("x".into()), one(), one())).starts_with("Stud_id: \"x\""));
        assert!(refused(named(Value::Text(u64::MAX.to_string()), one(), one())).starts_with("Stud_id"));
        assert!(refused(named(one(), one(), Value::Text("1".into()))).starts_with("Mean"));
        let mut less = named(one(), one(), one());
        less.remove("Stud_name");
        assert_eq!(refused(less), "Stud_name is missing");
        let mut more = named(one(), one(), one());
        more.insert("Age".into(), one());
        assert_eq!(refused(more), "Age is no column");
        let row = schema.row(named(Value::Text("2255".into()), one(), one())).unwrap();
        assert_eq!(row.values()[0], Value::Integer(2255));
    }

    #[test]
    fn schemas_that_contradict_themselves_are_refused() {
        let text = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let refused = |columns, dtypes: &[Dtype]| Schema::new(columns, dtypes.to_vec(), "id").is_err();
        assert!(refused(text(&["id"]), &[]));
        assert!(refused(text(&[]), &[]));
        assert!(refused(text(&["name"]), &[Dtype::Number]));
        assert!(refused(text(&["id"]), &[Dtype::String]));
        assert!(refused(text(&["id", "id"]), &[Dtype::Number, Dtype::Number]));
        assert!(refused(text(&["id", ""]), &[Dtype::Number, Dtype::Number]));
        assert!(!refused(text(&["name", "id"]), &[Dtype::String, Dtype::Number]));
    }

    #[test]
    fn stored_bytes_that_are_no_row_are_refused() {
        let schema = schema();
        let row = schema.row(named(Value::Integer(7), Value::Text("x".into()), Value::Float(1.0))).unwrap();
        let bytes = schema.encode(&row);
        for cut in 0..bytes.len() {
            assert!(schema.decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(schema.decode(&[&bytes[..], &[0]].concat()).is_err());
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x80;
            let _ = schema.decode(&bytes); // it must not panic, whatever it says
        }
    }

    #[test]
    fn ranges_that_overlap_leave_a_gap_or_leave_the_ids_are_refused_by_name() {
        let refused = |shards: &[RangeShard]| Shards::new(shards.to_vec()).unwrap_err();
        assert_eq!(refused(&[shard("a", 0, 0)]), RowsError::Range { name: "a".into(), why: "its size is 0".into() });
        assert_eq!(refused(&[shard("a", 0, 9), shard("a", 9, 9)]), RowsError::DuplicateShard("a".into()));
        assert_eq!(refused(&[shard("b", 8, 9), shard("a", 0, 9)]), RowsError::Overlap("a".into(), "b".into()));
        let gap = refused(&[shard("b", 20, 9), shard("a", 0, 9)]);
        assert_eq!(gap, RowsError::Gap("a".into(), "b".into(), 9, 20));
        assert!(matches!(refused(&[shard("a", u64::MAX, 9)]), RowsError::Range { .. }));
        assert!(matches!(refused(&[shard("a", ID_MAX, 1)]), RowsError::Range { .. }));
    }

    #[test]
    fn an_id_is_of_the_shard_that_begins_before_it_and_ends_after_it() {
        let shards = Shards::new(vec![shard("b", 20, 10), shard("a", 10, 10)]).unwrap();
        let holding = |id| shards.holding(id).map(|shard| shard.name.as_str());
        let expected = [(9, None), (10, Some("a")), (19, Some("a")), (20, Some("b")), (29, Some("b")), (30, None)];
        for (id, name) in expected {
            assert_eq!(holding(id), name, "{id}");
        }
        let touched: Vec<_> = shards.touched(5, 25).map(|(shard, low, high)| (&shard.name[..], low, high)).collect();
        assert_eq!(touched, [("a", 10, 19), ("b", 20, 25)]);
        assert_eq!(shards.touched(0, 9).count(), 0);
        assert_eq!(shards.touched(25, 5).count(), 0);
    }

    #[test]
    fn parts_adjoin_cover_all_keys_and_hold_what_their_shards_hold() {
        for shards in [vec![], vec![("a", 0, 10)], vec![("a", 5, 10), ("b", 15, 5), ("c", 20, 1)]] {
            let shards = shards.into_iter().map(|(name, low, size)| shard(name, low, size)).collect();
            let shards = Shards::new(shards).unwrap();
            let parts = shards.parts();
            let mut at = Some(vec![]);
            for (part, shard) in &parts {
                let Part::Range { start, end } = part else { panic!("not a range") };
                assert_eq!(Some(start), at.as_ref());
                at.clone_from(end);
                assert!(end.as_ref().is_none_or(|end| end > start));
                if let Some(shard) = shard {
                    assert!(part.holds(&key_of(shard.low)) && part.holds(&key_of(shard.end() - 1)));
                    assert!(!part.holds(&key_of(shard.end())));
                }
            }
            assert_eq!(at, None);
            assert_eq!(parts.iter().filter(|(_, shard)| shard.is_some()).count(), shards.iter().len());
        }
    }

    #[test]
    fn inserts_name_the_row_that_has_no_shard_or_is_there_twice() {
        let schema = schema();
        let row = |id| schema.row(named(Value::Integer(id), Value::Integer(0), Value::Integer(0))).unwrap();
        let shards = Shards::new(vec![shard("a", 0, 10)]).unwrap();
        let writes = inserts(&schema, Some(&shards), &[row(3), row(9)]).unwrap();
        assert_eq!(writes.iter().map(|write| id_of(&write.key)).collect::<Vec<_>>(), [Some(3), Some(9)]);
        assert!(writes.iter().all(|write| write.condition == Condition::Absent));
        let column = || "Stud_id".to_owned();
        let nowhere = inserts(&schema, Some(&shards), &[row(3), row(10)]);
        assert_eq!(nowhere, Err(RowsError::Nowhere { column: column(), id: 10 }));
        let twice = inserts(&schema, Some(&shards), &[row(3), row(4), row(3)]);
        assert_eq!(twice, Err(RowsError::Twice { column: column(), id: 3, first: 0, second: 2 }));
    }
}
