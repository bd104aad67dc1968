//! The schema: the declarations of events as JSON, for programs.

use serde_json::{Value, json};
use viommu_wire::model::Model;

use crate::event::{self, Kind, key};
use crate::part::schema_of_members;
use crate::place::{Place, word};
use crate::record::{Header, NO_ENDPOINT, Record, VERSION};

/// A field's place: the offset of its 64-bit word in bytes, and its bits in that word.
pub fn place(place: Place) -> Value {
    json!({ "offset": place.word * 8, "bit": place.low, "bits": place.width })
}

/// A kind and its layouts.
pub fn kind(kind: Kind, layouts: Vec<Value>) -> Value {
    json!({
        "name": kind.name(),
        "number": kind as u16,
        "on_request": Kind::DEFAULT & kind.bit() == 0,
        "layouts": layouts,
    })
}

/// One of a kind's layouts.
pub fn layout(doc: &str, endpoint: &str, fields: Vec<Value>) -> Value {
    let doc: Vec<_> = doc.lines().map(str::trim).collect();
    json!({ "doc": doc.join(" ").trim(), "endpoint": endpoint, "fields": fields })
}

/// A field with its names, which may have conditions.
pub fn field(mut unit: Value, r#type: &str, at: Place, names: &[(&str, Option<&str>)], derived: Option<&str>) -> Value {
    let names: Vec<_> = names.iter().map(|(name, condition)| json!({ "name": name, "if": condition })).collect();
    unit["names"] = names.into();
    unit["type"] = r#type.into();
    unit["place"] = place(at);
    if let Some(derived) = derived {
        unit["derived"] = derived.into();
    }
    unit
}

fn named<N: Copy + Into<u64>>(table: &[(N, &str)]) -> Vec<Value> {
    table.iter().map(|(number, name)| json!({ "number": Into::<u64>::into(*number), "name": name })).collect()
}

/// The format of the trace as `viommu trace --schema` prints it.
pub fn schema() -> Value {
    let common = |name: &str, unit: &str, offset: usize, bit: u32, bits: u32| json!({ "name": name, "unit": unit, "place": { "offset": offset, "bit": bit, "bits": bits } });
    let queues = |model: Model| {
        let table = |queue| named((model.declaration().opcodes)(queue));
        json!({ "0": table(0), "others": table(1) })
    };
    // The bits at which the parts of a command and of a state begin.
    let (command, state) = (64 * word::a3.word as u32 + 32, 64 * (word::a0.word as u32) - 32);
    let models = Model::ALL.iter().map(|model| {
        json!({
            "name": model.name(),
            "number": *model as u8,
            "opcodes_by_queue": queues(*model),
            "command": schema_of_members(model.declaration().command, command),
            "state": schema_of_members(model.declaration().state, state),
            "registers": named(model.declaration().register_names),
        })
    });
    json!({
        "version": VERSION,
        "header_size": size_of::<Header>(),
        "record_size": size_of::<Record>(),
        "common": [
            common(key::TIME, "ns", 0, 0, 64),
            common(key::SEQ, "number", 8, 0, 64),
            common(key::KIND, "name", 16, 0, 16),
            common(key::ENDPOINT, "number", 16, 32, 32),
        ],
        "derived": [key::BDF],
        "no_endpoint": NO_ENDPOINT,
        "kinds": event::kinds(),
        "models": models.collect::<Vec<_>>(),
    })
}
