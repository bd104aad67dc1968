//! Units: how the values of fields are written as JSON and as text, and read from JSON.

use serde_json::json;
use viommu_wire::Named as Enumeration;

use crate::members::{Members, Value};
use crate::{names, put};

/// What a line has for a field.
pub enum Found<T> {
    /// This value.
    Is(T),
    /// No member.
    Nothing,
    /// A member with an unknown value.
    Nonsense,
}

impl<T> Found<T> {
    pub fn of<'v, 'l>(value: Option<&'v Value<'l>>, read: impl FnOnce(&'v Value<'l>) -> Option<T>) -> Self {
        match value.map(read) {
            Some(Some(value)) => Found::Is(value),
            Some(None) => Found::Nonsense,
            None => Found::Nothing,
        }
    }
}

/// How values of a type are written and read. For writing, a key comes as it is to be written: `,"key":` or ` key=`.
pub trait Unit<T> {
    /// Whether a field can have the value. Layouts of one kind are told apart by this.
    #[inline]
    fn accepts(&self, _: &T) -> bool {
        true
    }

    /// Whether there is a value to write.
    #[inline]
    fn is_there(&self, _: &T) -> bool {
        true
    }

    /// Appends the member.
    fn json(&self, key: &str, value: T, out: &mut Vec<u8>);

    /// Appends the field.
    fn text(&self, key: &str, value: T, out: &mut Vec<u8>);

    /// Reads the member with this key.
    fn read(&self, key: &str, members: &Members<'_>) -> Found<T>;

    /// The unit's entry in the schema.
    fn schema(&self) -> serde_json::Value;

    /// A value made of numbers from `next`, that can be read back.
    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> T;
}

pub fn put_str(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(text.as_bytes());
}

/// Declares units that JSON writes as a number.
macro_rules! decimal {
    ($($(#[$meta:meta])* $name:ident $schema:literal: $($type:ty),*;)*) => { $(
        $(#[$meta])*
        pub struct $name;

        $(impl Unit<$type> for $name {
            #[inline]
            fn json(&self, key: &str, value: $type, out: &mut Vec<u8>) {
                put_str(key, out);
                put::number(value.into(), out);
            }

            fn text(&self, key: &str, value: $type, out: &mut Vec<u8>) {
                self.json(key, value, out);
            }

            fn read(&self, key: &str, members: &Members<'_>) -> Found<$type> {
                Found::of(members.get(key), |value| value.number()?.try_into().ok())
            }

            fn schema(&self) -> serde_json::Value {
                json!({ "unit": $schema, "json": "number" })
            }

            #[cfg(test)]
            fn draw(&self, next: &mut dyn FnMut() -> u64) -> $type {
                next() as $type
            }
        })*
    )* };
}

decimal! {
    /// An identifier, an index, a count.
    Number "number": u8, u16, u32, u64;
    /// A length in bytes.
    Bytes "bytes": u8, u32, u64;
    /// A moment of `CLOCK_MONOTONIC`, ns.
    Moment "ns": u64;
}

/// An optional number.
impl Unit<Option<u32>> for Number {
    fn is_there(&self, value: &Option<u32>) -> bool {
        value.is_some()
    }

    #[inline]
    fn json(&self, key: &str, value: Option<u32>, out: &mut Vec<u8>) {
        put_str(key, out);
        put::number(value.unwrap_or(0).into(), out);
    }

    fn text(&self, key: &str, value: Option<u32>, out: &mut Vec<u8>) {
        self.json(key, value, out);
    }

    fn read(&self, key: &str, members: &Members<'_>) -> Found<Option<u32>> {
        Found::of(members.get(key), |value| Some(Some(value.number()?.try_into().ok()?)))
    }

    fn schema(&self) -> serde_json::Value {
        json!({ "unit": "number", "json": "number", "optional": true })
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> Option<u32> {
        let number = next();
        (number >> 32 & 1 != 0).then_some(number as u32)
    }
}

/// A duration, ns. The text has it in microseconds, and its name without the suffix `_ns`.
pub struct Nanoseconds;

impl Unit<u64> for Nanoseconds {
    #[inline]
    fn json(&self, key: &str, value: u64, out: &mut Vec<u8>) {
        put_str(key, out);
        put::number(value, out);
    }

    fn text(&self, key: &str, value: u64, out: &mut Vec<u8>) {
        put_str(key.trim_end_matches("_ns="), out);
        out.push(b'=');
        put::number(value / 1000, out);
        out.push(b'.');
        let rest = value % 1000;
        out.push(b'0' + (rest / 100) as u8);
        out.push(b'0' + (rest / 10 % 10) as u8);
        out.push(b'0' + (rest % 10) as u8);
        put_str("us", out);
    }

    fn read(&self, key: &str, members: &Members<'_>) -> Found<u64> {
        Found::of(members.get(key), Value::number)
    }

    fn schema(&self) -> serde_json::Value {
        json!({ "unit": "ns", "json": "number" })
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> u64 {
        next()
    }
}

/// An address, a tag or a bit mask.
pub struct Hex;

macro_rules! hex {
    ($($type:ty),*) => { $(
        impl Unit<$type> for Hex {
            #[inline]
            fn json(&self, key: &str, value: $type, out: &mut Vec<u8>) {
                put_str(key, out);
                out.push(b'"');
                put::hex(value.into(), out);
                out.push(b'"');
            }

            fn text(&self, key: &str, value: $type, out: &mut Vec<u8>) {
                put_str(key, out);
                put::hex(value.into(), out);
            }

            fn read(&self, key: &str, members: &Members<'_>) -> Found<$type> {
                Found::of(members.get(key), |value| value.hex()?.try_into().ok())
            }

            fn schema(&self) -> serde_json::Value {
                json!({ "unit": "hex", "json": "string" })
            }

            #[cfg(test)]
            fn draw(&self, next: &mut dyn FnMut() -> u64) -> $type {
                next() as $type
            }
        }
    )* };
}

hex!(u32, u64);

/// A yes or no.
pub struct Flag;

impl Unit<bool> for Flag {
    #[inline]
    fn json(&self, key: &str, value: bool, out: &mut Vec<u8>) {
        put_str(key, out);
        put_str(if value { "true" } else { "false" }, out);
    }

    fn text(&self, key: &str, value: bool, out: &mut Vec<u8>) {
        put_str(key, out);
        out.push(b'0' + u8::from(value));
    }

    fn read(&self, key: &str, members: &Members<'_>) -> Found<bool> {
        Found::of(members.get(key), |value| if let Value::Flag(flag) = value { Some(*flag) } else { None })
    }

    fn schema(&self) -> serde_json::Value {
        json!({ "unit": "flag", "json": "boolean" })
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> bool {
        next() & 1 != 0
    }
}

/// Appends a name, which must be printable ASCII without quotes and backslashes.
#[inline]
pub fn put_name(key: &str, name: &str, out: &mut Vec<u8>) {
    put_str(key, out);
    out.push(b'"');
    put_str(name, out);
    out.push(b'"');
}

/// The schema of numbers that have names.
pub fn schema_of_names(values: impl Iterator<Item = (u8, &'static str)>) -> serde_json::Value {
    let values: Vec<_> = values.map(|(number, name)| json!({ "number": number, "name": name })).collect();
    json!({ "unit": "name", "json": "string", "values": values })
}

/// A value of an enumeration, by its name.
pub struct Named;

impl<T: Enumeration> Unit<T> for Named {
    #[inline]
    fn json(&self, key: &str, value: T, out: &mut Vec<u8>) {
        put_name(key, value.name(), out);
    }

    fn text(&self, key: &str, value: T, out: &mut Vec<u8>) {
        put_str(key, out);
        put_str(value.name(), out);
    }

    fn read(&self, key: &str, members: &Members<'_>) -> Found<T> {
        Found::of(members.get(key), |value| T::from_name(value.text()?))
    }

    fn schema(&self) -> serde_json::Value {
        schema_of_names(T::ALL.iter().map(|value| (value.number(), value.name())))
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> T {
        T::ALL[next() as usize % T::ALL.len()]
    }
}

/// A number that has a name in a specification. Without a name it is written in hexadecimal.
pub struct Coded {
    /// The name of a number.
    pub name: fn(u8) -> Option<&'static str>,
    /// Whether the field can have the number.
    pub accepts: fn(u8) -> bool,
}

/// The index of a virtqueue.
pub const VIRTQUEUE: Coded = Coded { name: names::virtqueue, accepts: |_| true };
/// The type of a request.
pub const REQUEST_TYPE: Coded = Coded { name: names::request, accepts: |_| true };
/// The type of a request that is not of the split protocol.
pub const BASE_TYPE: Coded = Coded { name: names::request, accepts: |number| !names::is_split(number) };
/// The type of a request of the split protocol.
pub const SPLIT_TYPE: Coded = Coded { name: names::request, accepts: names::is_split };
/// The status of a request.
pub const STATUS: Coded = Coded { name: names::status, accepts: |_| true };
/// The reason of a fault.
pub const FAULT_REASON: Coded = Coded { name: names::fault_reason, accepts: |_| true };

impl Unit<u8> for Coded {
    #[inline]
    fn accepts(&self, value: &u8) -> bool {
        (self.accepts)(*value)
    }

    #[inline]
    fn json(&self, key: &str, value: u8, out: &mut Vec<u8>) {
        match (self.name)(value) {
            Some(name) => put_name(key, name, out),
            None => Hex.json(key, u32::from(value), out),
        }
    }

    fn text(&self, key: &str, value: u8, out: &mut Vec<u8>) {
        match (self.name)(value) {
            Some(name) => {
                put_str(key, out);
                put_str(name, out);
            }
            None => Hex.text(key, u32::from(value), out),
        }
    }

    fn read(&self, key: &str, members: &Members<'_>) -> Found<u8> {
        Found::of(members.get(key), |value| {
            let wanted = value.text()?;
            let named = (0..=u8::MAX).find(|number| (self.name)(*number) == Some(wanted));
            named.or_else(|| value.hex()?.try_into().ok())
        })
    }

    fn schema(&self) -> serde_json::Value {
        let accepted = (0..=u8::MAX).filter(|number| (self.accepts)(*number));
        schema_of_names(accepted.filter_map(|number| Some((number, (self.name)(number)?))))
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> u8 {
        let from = next() as u8;
        // Half of them are small numbers, which have names.
        let some = if from.is_multiple_of(2) { from % 16 } else { from };
        (0..=u8::MAX).map(|more| some.wrapping_add(more)).find(|number| (self.accepts)(*number)).unwrap()
    }
}

/// A number that has a name in a table of the model. Without a name it is written in hexadecimal.
pub struct Tabled<N: 'static>(pub &'static [(N, &'static str)]);

impl<N: Copy + PartialEq + Into<u64> + TryFrom<u64>> Tabled<N> {
    fn name(&self, value: N) -> Option<&'static str> {
        self.0.iter().find(|(number, _)| *number == value).map(|(_, name)| *name)
    }
}

impl<N: Copy + PartialEq + Into<u64> + TryFrom<u64>> Unit<N> for Tabled<N> {
    #[inline]
    fn json(&self, key: &str, value: N, out: &mut Vec<u8>) {
        match self.name(value) {
            Some(name) => put_name(key, name, out),
            None => Unit::<u64>::json(&Hex, key, value.into(), out),
        }
    }

    fn text(&self, key: &str, value: N, out: &mut Vec<u8>) {
        match self.name(value) {
            Some(name) => {
                put_str(key, out);
                put_str(name, out);
            }
            None => Unit::<u64>::text(&Hex, key, value.into(), out),
        }
    }

    fn read(&self, key: &str, members: &Members<'_>) -> Found<N> {
        Found::of(members.get(key), |value| {
            let wanted = value.text()?;
            let named = self.0.iter().find(|(_, name)| *name == wanted).map(|(number, _)| *number);
            named.or_else(|| value.hex()?.try_into().ok())
        })
    }

    fn schema(&self) -> serde_json::Value {
        json!({ "unit": "name", "json": "string", "values_of": "model" })
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> N {
        let number = next();
        match self.0.get(number as usize % (2 * self.0.len() + 1)) {
            Some((named, _)) => *named,
            None => N::try_from(number & 0xff).unwrap_or_else(|_| unreachable!()),
        }
    }
}

/// The flags of a request of this type.
pub struct Flags(pub u8);

impl Unit<u32> for Flags {
    #[inline]
    fn json(&self, key: &str, value: u32, out: &mut Vec<u8>) {
        put_name(key, &names::flags(self.0, value), out);
    }

    fn text(&self, key: &str, value: u32, out: &mut Vec<u8>) {
        put_str(key, out);
        put_str(&names::flags(self.0, value), out);
    }

    fn read(&self, key: &str, members: &Members<'_>) -> Found<u32> {
        Found::of(members.get(key), |value| names::flags_named(self.0, value.text()?))
    }

    fn schema(&self) -> serde_json::Value {
        json!({ "unit": "flags", "json": "string" })
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> u32 {
        let from = next();
        if from >> 32 & 1 != 0 { from as u32 } else { from as u32 % 8 }
    }
}

/// A member that is derived from other fields, for the reader's convenience.
pub trait Derived {
    /// Appends the member.
    fn json(&self, key: &str, out: &mut Vec<u8>);

    /// Appends the field.
    fn text(&self, key: &str, out: &mut Vec<u8>);
}

/// The length in bytes of an inclusive range, 0 if it ends before it starts.
pub struct Size(pub u64, pub u64);

impl Size {
    fn bytes(&self) -> u128 {
        (u128::from(self.1) + 1).saturating_sub(u128::from(self.0))
    }
}

impl Derived for Size {
    #[inline]
    fn json(&self, key: &str, out: &mut Vec<u8>) {
        put_str(key, out);
        // A guest may ask for all 2^64 bytes.
        match u64::try_from(self.bytes()) {
            Ok(bytes) => put::number(bytes, out),
            Err(_) => put_str("18446744073709551616", out),
        }
    }

    fn text(&self, key: &str, out: &mut Vec<u8>) {
        put_str(key, out);
        match u64::try_from(self.bytes()) {
            Ok(bytes) => put::hex(bytes, out),
            Err(_) => put_str("0x10000000000000000", out),
        }
    }
}

/// The names of feature bits.
pub struct Features(pub u64);

impl Derived for Features {
    fn json(&self, key: &str, out: &mut Vec<u8>) {
        put_str(key, out);
        out.push(b'[');
        for (n, name) in names::features(self.0).enumerate() {
            put_name(if n == 0 { "" } else { "," }, &name, out);
        }
        out.push(b']');
    }

    fn text(&self, key: &str, out: &mut Vec<u8>) {
        put_str(key, out);
        for (n, name) in names::features(self.0).enumerate() {
            put_str(if n == 0 { "" } else { "," }, out);
            put_str(&name, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_its_exact_size() {
        assert_eq!(Size(0, 0xfff).bytes(), 0x1000);
        assert_eq!(Size(0, u64::MAX).bytes(), 1 << 64);
        assert_eq!(Size(0x2000, 0xfff).bytes(), 0);
        assert_eq!(Size(u64::MAX, 0).bytes(), 0);
        let written = |size: Size| {
            let mut out = Vec::new();
            size.json("", &mut out);
            size.text(" ", &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(written(Size(0, u64::MAX)), format!("{} {:#x}", 1u128 << 64, 1u128 << 64));
        assert_eq!(written(Size(1, 16)), "16 0x10");
    }
}
