//! The model's part of an event, with the members that the model declares.

use serde_json::json;
use viommu_wire::model::{Form, Member, Model, Part};

use crate::members::Members;
use crate::unit::{Found, Hex, Number, Unit, put_name, put_str, schema_of_names};

/// Members that a model declares, with their values in a part.
trait Declared {
    fn members(&self) -> &'static [Member];
    fn queue(&self) -> u32;

    fn there<'a>(&'a self, part: &'a Part) -> impl Iterator<Item = (&'static Member, u64)> + 'a {
        let there = self.members().iter().filter(|member| (member.is_there)(self.queue(), part));
        there.map(|member| (member, member.get(part)))
    }

    #[inline]
    fn put_json(&self, part: &Part, out: &mut Vec<u8>) {
        for (member, value) in self.there(part) {
            put_str(",\"", out);
            put_str(member.name, out);
            match named(member, value) {
                Some(name) => put_name("\":", name, out),
                None if matches!(member.form, Form::Number) => Number.json("\":", value, out),
                None => Hex.json("\":", value, out),
            }
        }
    }

    fn put_text(&self, part: &Part, out: &mut Vec<u8>) {
        for (member, value) in self.there(part) {
            out.push(b' ');
            put_str(member.name, out);
            match named(member, value) {
                Some(name) => {
                    out.push(b'=');
                    put_str(name, out);
                }
                None if matches!(member.form, Form::Number) => Number.text("=", value, out),
                None => Hex.text("=", value, out),
            }
        }
    }

    /// Reads the members. A missing member counts as 0.
    fn take(&self, members: &Members<'_>) -> Found<Part> {
        let mut part = Part::default();
        for member in self.members() {
            let found = Found::of(members.get(member.name), |value| match member.form {
                Form::Number => value.number(),
                Form::Hex => value.hex(),
                Form::Name(names) => {
                    let wanted = value.text()?;
                    let named = names.iter().position(|name| *name == wanted).map(|number| number as u64);
                    named.or_else(|| value.hex())
                }
            });
            match found {
                Found::Is(value) => member.set(&mut part, value),
                Found::Nothing => {}
                Found::Nonsense => return Found::Nonsense,
            }
        }
        Found::Is(part)
    }

    #[cfg(test)]
    fn draw_part(&self, next: &mut dyn FnMut() -> u64) -> Part {
        let mut whole = Part::default();
        self.members().iter().for_each(|member| member.set(&mut whole, next()));
        let mut part = Part::default();
        self.there(&whole).for_each(|(member, value)| member.set(&mut part, value));
        part
    }
}

fn named(member: &Member, value: u64) -> Option<&'static str> {
    if let Form::Name(names) = member.form { names.get(value as usize).copied() } else { None }
}

/// The schema of a model's members. `from` is the bit of the record at which the part begins.
pub fn schema_of_members(members: &[Member], from: u32) -> Vec<serde_json::Value> {
    let member = |member: &Member| {
        let mut schema = match member.form {
            Form::Number => Unit::<u64>::schema(&Number),
            Form::Hex => Unit::<u64>::schema(&Hex),
            Form::Name(names) => schema_of_names((0..).zip(names.iter().copied())),
        };
        let at = from + member.low;
        schema["name"] = member.name.into();
        schema["place"] = json!({ "offset": at / 64 * 8, "bit": at % 64, "bits": member.width });
        schema
    };
    members.iter().map(member).collect()
}

/// The model's part of a command, on the queue with this index.
pub struct CommandPart(pub Model, pub u32);

impl Declared for CommandPart {
    fn members(&self) -> &'static [Member] {
        self.0.declaration().command
    }

    fn queue(&self) -> u32 {
        self.1
    }
}

impl Unit<Part> for CommandPart {
    #[inline]
    fn json(&self, _: &str, part: Part, out: &mut Vec<u8>) {
        self.put_json(&part, out);
    }

    fn text(&self, _: &str, part: Part, out: &mut Vec<u8>) {
        self.put_text(&part, out);
    }

    fn read(&self, _: &str, members: &Members<'_>) -> Found<Part> {
        self.take(members)
    }

    fn schema(&self) -> serde_json::Value {
        json!({ "members_of": "model" })
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> Part {
        self.draw_part(next)
    }
}

/// A model's state.
pub struct ModelState(pub Model);

impl Declared for ModelState {
    fn members(&self) -> &'static [Member] {
        self.0.declaration().state
    }

    fn queue(&self) -> u32 {
        0
    }
}

fn part_of(state: u64) -> Part {
    Part { detail: 0, words: [state, 0] }
}

impl Unit<u64> for ModelState {
    #[inline]
    fn json(&self, _: &str, state: u64, out: &mut Vec<u8>) {
        self.put_json(&part_of(state), out);
    }

    fn text(&self, _: &str, state: u64, out: &mut Vec<u8>) {
        self.put_text(&part_of(state), out);
    }

    fn read(&self, _: &str, members: &Members<'_>) -> Found<u64> {
        match self.take(members) {
            Found::Is(part) => Found::Is(part.words[0]),
            Found::Nothing => Found::Nothing,
            Found::Nonsense => Found::Nonsense,
        }
    }

    fn schema(&self) -> serde_json::Value {
        json!({ "members_of": "model" })
    }

    #[cfg(test)]
    fn draw(&self, next: &mut dyn FnMut() -> u64) -> u64 {
        self.draw_part(next).words[0]
    }
}
