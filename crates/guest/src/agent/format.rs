//! The layout of an event's record, from its `format` file in tracefs, and its fields as JSON.

use std::fmt::Write;

use serde_json::Value;

/// Fields that are addresses or tags: strings in hexadecimal, as JSON's numbers are exact up to 2^53 only.
const ADDRESSES: [&str; 8] = ["iova", "phys", "paddr", "tag", "addr", "address", "dma_addr", "phys_addr"];
/// Members that every event has. A field of the same name gets a `_` at its end.
const MEMBERS: [&str; 8] = ["t", "kind", "event", "cpu", "task", "endpoint", "bdf", "seq"];

/// One event's layout.
#[derive(Debug)]
pub struct Format {
    /// `SYSTEM:NAME`
    pub name: String,
    /// The number in the records' first field.
    pub id: u16,
    fields: Vec<Field>,
}

#[derive(Debug)]
struct Field {
    name: String,
    offset: usize,
    size: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Unsigned,
    Signed,
    Address,
    /// Characters, up to the first 0.
    Text,
    /// A word says where in the record the characters are, and how many.
    PlacedText,
    /// Anything else: the bytes.
    Bytes,
}

impl Format {
    /// Parses a `format` file. `None` if the text is something else.
    pub fn parse(system: &str, text: &str) -> Option<Self> {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        let fields = text.lines().filter_map(|line| field(line.trim().strip_prefix("field:")?));
        let fields = fields.filter(|field| !field.name.starts_with("common_")).collect();
        Some(Self { name: format!("{system}:{}", value("name:")?), id: value("ID:")?.parse().ok()?, fields })
    }

    /// The fields of a record as members, in the record's order.
    pub fn members<'a>(&'a self, record: &'a [u8]) -> impl Iterator<Item = (&'a str, Value)> {
        self.fields.iter().filter_map(|field| {
            let bytes = record.get(field.offset..field.offset + field.size)?;
            Some((field.name.as_str(), field.value(bytes, record)))
        })
    }
}

/// The number of a record's event, and the thread that it happened in: the fields that all records begin with.
pub fn head(record: &[u8]) -> Option<(u16, i32)> {
    let id = u16::from_le_bytes(*record.first_chunk()?);
    let task = i32::from_le_bytes(*record.get(4..)?.first_chunk()?);
    Some((id, task))
}

/// A declaration, offset, size and signedness, ended by semicolons: `u64 iova; offset:16; size:8; signed:0;`
fn field(line: &str) -> Option<Field> {
    let mut parts = line.split(';').map(str::trim);
    let declaration = parts.next()?;
    let (mut offset, mut size, mut signed) = (None, None, false);
    for part in parts {
        match part.split_once(':') {
            Some(("offset", value)) => offset = value.parse().ok(),
            Some(("size", value)) => size = value.parse().ok(),
            Some(("signed", value)) => signed = value == "1",
            _ => {}
        }
    }
    let (kind, name) = declaration.rsplit_once([' ', '*'])?;
    let (name, array) = name.split_once('[').map_or((name, kind.contains('[')), |(name, _)| (name, true));
    let size = size?;
    let kind = match size {
        4 if kind.starts_with("__data_loc char") => Kind::PlacedText,
        _ if kind.starts_with("__data_loc") || kind.starts_with("__rel_loc") => Kind::Bytes,
        _ if array && kind.starts_with("char") => Kind::Text,
        1 | 2 | 4 | 8 if !array && ADDRESSES.contains(&name) => Kind::Address,
        1 | 2 | 4 | 8 if !array && signed => Kind::Signed,
        1 | 2 | 4 | 8 if !array => Kind::Unsigned,
        _ => Kind::Bytes,
    };
    let taken = if MEMBERS.contains(&name) { "_" } else { "" };
    Some(Field { name: format!("{name}{taken}"), offset: offset?, size, kind })
}

impl Field {
    fn value(&self, bytes: &[u8], record: &[u8]) -> Value {
        let number = bytes.iter().rev().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte));
        match self.kind {
            Kind::Unsigned => number.into(),
            Kind::Signed => {
                let unused = 64 - 8 * self.size as u32;
                ((number << unused) as i64 >> unused).into()
            }
            Kind::Address => format!("{number:#x}").into(),
            Kind::Text => text(bytes),
            Kind::PlacedText => {
                let (offset, length) = ((number & 0xffff) as usize, (number >> 16) as usize);
                record.get(offset..offset + length).map_or(Value::Null, text)
            }
            Kind::Bytes => {
                let mut digits = String::from("0x");
                for byte in bytes {
                    // A String takes it all.
                    let _ = write!(digits, "{byte:02x}");
                }
                digits.into()
            }
        }
    }
}

fn text(bytes: &[u8]) -> Value {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LINK: &str = "name: dma_iova_link\nID: 512\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
        \tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;\n\
        \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
        \tfield:__data_loc char[] device;\toffset:8;\tsize:4;\tsigned:0;\n\
        \tfield:u64 iova;\toffset:16;\tsize:8;\tsigned:0;\n\
        \tfield:size_t size;\toffset:24;\tsize:8;\tsigned:0;\n\
        \tfield:int ret;\toffset:32;\tsize:4;\tsigned:1;\n\
        \tfield:u8 cdw10[4];\toffset:36;\tsize:4;\tsigned:0;\n\
        \tfield:char disk[4];\toffset:40;\tsize:4;\tsigned:0;\n\
        \tfield:bool cpu;\toffset:44;\tsize:1;\tsigned:0;\n\n\
        print fmt: \"%s iova=%#llx\", __get_str(device), REC->iova\n";

    #[test]
    fn a_record_becomes_members() {
        let format = Format::parse("dma_iova", LINK).unwrap();
        assert_eq!((format.name.as_str(), format.id), ("dma_iova:dma_iova_link", 512));
        let mut record = vec![0, 2, 0, 0, 0xfe, 0xff, 0xff, 0xff];
        record.extend((8_u32 << 16 | 48).to_le_bytes());
        record.extend([0; 4]);
        record.extend(0xffff_0000_1000_u64.to_le_bytes());
        record.extend(4096_u64.to_le_bytes());
        record.extend((-5_i32).to_le_bytes());
        record.extend([1, 2, 3, 0xff]);
        record.extend(*b"n1\0x");
        record.extend([1, 0, 0, 0]);
        record.extend(*b"04.0\0\0\0\0");
        assert_eq!(head(&record), Some((512, -2)));
        let members = |record: &[u8]| {
            let members = format.members(record).map(|(name, value)| (name.to_owned(), value));
            Value::Object(members.collect())
        };
        let wanted = json!({ "device": "04.0", "iova": "0xffff00001000", "size": 4096, "ret": -5,
                             "cdw10": "0x010203ff", "disk": "n1", "cpu_": 1 });
        assert_eq!(members(&record), wanted);
        // A record that is cut off has fewer members.
        assert_eq!(members(&record[..20]), json!({ "device": null }));
        assert!(Format::parse("x", "nonsense").is_none());
    }
}
