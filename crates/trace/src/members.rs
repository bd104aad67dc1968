//! The members of a line of JSON.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The value of a member, as far as readers of a trace need it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// A whole number that is not negative.
    Number(u64),
    /// A negative whole number.
    Negative(i64),
    /// A string.
    Text(Cow<'a, str>),
    /// True or false.
    Flag(bool),
    /// Something that no reader needs: a fraction, a list, an object or null.
    Other,
}

/// The members of an object, in their order.
#[derive(Clone, Debug, Default)]
pub struct Members<'a>(Vec<(Cow<'a, str>, Value<'a>)>);

impl<'a> Members<'a> {
    /// Parses a line.
    pub fn parse(line: &'a str) -> serde_json::Result<Self> {
        serde_json::from_str(line)
    }

    /// The first member with this name.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Renames a member, if there is one with the name `from`.
    pub fn rename(&mut self, from: &str, to: &'a str) {
        if let Some((name, _)) = self.0.iter_mut().find(|(name, _)| name == from) {
            *name = Cow::Borrowed(to);
        }
    }

    /// A member that is a number; `None` if it is missing or something else.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.get(key)?.number()
    }

    /// A member that is a string; `None` if it is missing or something else.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.text()
    }

    /// A member that is a string with a hexadecimal number, such as `"0x104b2000"`.
    pub fn hex(&self, key: &str) -> Option<u64> {
        self.get(key)?.hex()
    }
}

impl Value<'_> {
    /// The value as a number.
    pub fn number(&self) -> Option<u64> {
        if let Value::Number(number) = self { Some(*number) } else { None }
    }

    /// The value as a string.
    pub fn text(&self) -> Option<&str> {
        if let Value::Text(text) = self { Some(text) } else { None }
    }

    /// The value as a hexadecimal number, such as `"0x104b2000"`.
    pub fn hex(&self) -> Option<u64> {
        let digits = self.text()?.strip_prefix("0x")?;
        // `from_str_radix` also takes a sign, which the trace never writes.
        digits.bytes().all(|digit| digit.is_ascii_hexdigit()).then(|| u64::from_str_radix(digits, 16).ok())?
    }
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::with_capacity(16);
                while let Some(Key(key)) = map.next_key()? {
                    members.push((key, map.next_value()?));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

/// A name, borrowed from the line unless it has escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Key(match Value::deserialize(deserializer)? {
            Value::Text(text) => text,
            _ => Cow::Borrowed(""),
        }))
    }
}

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Value<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value<'de>, E> {
                Ok(Value::Flag(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value<'de>, E> {
                Ok(Value::Number(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value<'de>, E> {
                Ok(u64::try_from(value).map_or(Value::Negative(value), Value::Number))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Value<'de>, E> {
                Ok(Value::Other)
            }

            fn visit_unit<E>(self) -> Result<Value<'de>, E> {
                Ok(Value::Other)
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Value<'de>, E> {
                Ok(Value::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Value<'de>, E> {
                Ok(Value::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value<'de>, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Value::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Value::Other)
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_told_apart() {
        let line = r#"{"a":1,"b":-1,"c":"0x1f","d":true,"e":null,"f":[1,{"a":2}],"g":1.5,"\u0068":"\"","a":2}"#;
        let members = Members::parse(line).unwrap();
        assert_eq!(members.number("a"), Some(1));
        assert_eq!(members.get("b"), Some(&Value::Negative(-1)));
        assert_eq!((members.hex("c"), members.text("c")), (Some(0x1f), Some("0x1f")));
        assert_eq!(members.get("d"), Some(&Value::Flag(true)));
        for other in ["e", "f", "g"] {
            assert_eq!(members.get(other), Some(&Value::Other));
        }
        assert_eq!(members.text("h"), Some("\""));
        assert_eq!(members.get("z"), None);
        for bad in ["", "[]", "{\"a\":1", "{\"a\":1}x", "1"] {
            assert!(Members::parse(bad).is_err(), "{bad}");
        }
        let not_hex = Members::parse(r#"{"a":"0x","b":"0x+1","c":"1f","d":"0x10000000000000000"}"#).unwrap();
        assert!(["a", "b", "c", "d"].iter().all(|key| not_hex.hex(key).is_none()));
    }
}
