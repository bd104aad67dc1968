//! The macros that turn the declarations in `event` into code.

/// Makes the types, the codecs and the schema from the declarations of events. A kind is declared as
///
/// ```text
/// Kind = NUMBER "name":
///     /// What happened.
///     Variant (endpoint: TYPE) {
///         field: TYPE as UNIT at PLACE, "key";
///     };
/// ```
///
/// * A kind that few clients want is `Kind = NUMBER "name" on request`: a client gets it only if it names it.
/// * A kind with several layouts has several variants with `or` between them. They are told apart by a field whose unit
///   does not accept all numbers.
/// * The endpoint is a `u32`, or an `Option<u32>`, which with `where CONDITION` is there exactly if the condition is
///   true. `()` stands for no endpoint.
/// * A unit is a type of `unit`. Its arguments may use fields that are declared before it.
/// * A place is a constant of `place::word`, or some of its bits: `a3[0..32]`.
/// * A key may have a condition: `"key" if CONDITION`. Without a key, the unit writes members of its own.
/// * `=> "key" UNIT(field)` after a key adds a member that is derived from fields.
macro_rules! events {
    ($(
        $kind:ident = $number:literal $kname:literal $(on $request:ident)? : $(
            $(#[doc = $doc:expr])+
            $name:ident ( $($e:ident : $etype:ty $(where $econd:expr)?)? ) { $(
                $field:ident : $type:ty as $unit:ident $(($($uarg:expr),+))? at $word:ident $([$low:literal .. $high:literal])?
                $(, $key:literal $(if $cond:expr)?)*
                $(=> $dkey:literal $dunit:ident ($($darg:expr),+))? ;
            )* }
        )or+ ;
    )*) => {
        /// The kind of an event. The numbers are part of the format: none is ever used again for something else.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Kind {
            $(#[doc = concat!("`", $kname, "`, see [`Event`].")] $kind = $number,)*
        }

        impl Kind {
            /// Every kind, in the order of the numbers.
            pub const ALL: [Kind; [$($number),*].len()] = [$(Kind::$kind),*];

            /// The kinds that a client gets only if it names them: bit n is the kind with number n.
            pub const ON_REQUEST: u64 = 0 $($(| { let $request = 1 << $number; $request })?)*;

            /// The kind with this number.
            #[inline]
            pub fn from_number(number: u16) -> Option<Kind> {
                match number {
                    $($number => Some(Kind::$kind),)*
                    _ => None,
                }
            }

            /// The name that JSON lines and filters use.
            pub fn name(self) -> &'static str {
                match self {
                    $(Kind::$kind => $kname,)*
                }
            }
        }

        /// One event, without its time and sequence number. Addresses and lengths are in bytes, durations in nanoseconds.
        #[allow(missing_docs, reason = "each variant's comment describes its fields")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Event {
            $($( $(#[doc = $doc])+ $name { $($e: $etype,)? $($field: $type,)* }, )+)*
        }

        impl Event {
            /// The event's kind.
            #[inline]
            pub const fn kind(&self) -> Kind {
                match self {
                    $($( Event::$name { .. } => Kind::$kind, )+)*
                }
            }

            /// The endpoint that the event is about, if there is one.
            #[inline]
            pub fn endpoint(&self) -> Option<u32> {
                match *self {
                    $($( Event::$name { $($e,)? .. } => declare::id!($($e)?), )+)*
                }
            }

            /// The event's record, with this time (ns) and sequence number.
            #[inline]
            pub fn encode(&self, time_ns: u64, seq: u64) -> Record {
                let mut words = [0; WORDS];
                (words[0], words[1]) = (time_ns, seq);
                match *self {
                    $($( Event::$name { $($e,)? $($field),* } => {
                        words[2] = $number;
                        declare::id!($($e)?).unwrap_or(NO_ENDPOINT).store(word::endpoint, &mut words);
                        $( $field.store(declare::place!($word $([$low..$high])?), &mut words); )*
                    } )+)*
                }
                Record::from_words(words)
            }

            /// The event that a record holds.
            ///
            /// # Errors
            /// The record is of another version, or damaged.
            #[inline]
            #[allow(clippy::redundant_closure_call, reason = "what returns from it ends one layout, not all")]
            pub fn decode(record: &Record) -> Result<Event, CodecError> {
                let words = record.words();
                match record.kind.get() {
                    $( $number => {
                        let bad = |value| CodecError::Value { kind: $kname, value };
                        let mut decoded = Err(bad(0));
                        $(
                            if decoded.is_err() {
                                let layout = || {
                                    $(
                                        let $field = <$type>::load(declare::place!($word $([$low..$high])?), &words).map_err(bad)?;
                                        if !Unit::<$type>::accepts(&$unit $(($($uarg),+))?, &$field) {
                                            return Err(bad(0));
                                        }
                                    )*
                                    $(
                                        let condition = declare::condition!($($econd)?);
                                        let $e = <$etype>::of(record.endpoint.get(), condition);
                                    )?
                                    Ok(Event::$name { $($e,)? $($field),* })
                                };
                                decoded = layout();
                            }
                        )+
                        decoded
                    } )*
                    number => Err(CodecError::Kind(number)),
                }
            }

            /// Appends the event's own members, without time, number, kind and endpoint.
            pub(crate) fn put_json(&self, out: &mut Vec<u8>) {
                match *self {
                    $($( Event::$name { $($field,)* .. } => {
                        $(
                            declare::write!(
                                json, out, $field: $type, $unit $(($($uarg),+))?, [",\"", "\":"] $(, $key $(if $cond)?)*
                                $(=> $dkey $dunit($($darg),+))?
                            );
                        )*
                    } )+)*
                }
            }

            /// Appends the event's own fields as text.
            pub(crate) fn put_text(&self, out: &mut Vec<u8>) {
                match *self {
                    $($( Event::$name { $($field,)* .. } => {
                        $(
                            declare::write!(
                                text, out, $field: $type, $unit $(($($uarg),+))?, [" ", "="] $(, $key $(if $cond)?)*
                                $(=> $dkey $dunit($($darg),+))?
                            );
                        )*
                    } )+)*
                }
            }

            /// The event that a line's members describe. `id` is the endpoint that they name.
            #[allow(unused_variables, reason = "not all kinds have members")]
            #[allow(clippy::redundant_closure_call, reason = "what returns from it ends one layout, not all")]
            pub(crate) fn read(kind: Kind, id: Option<u32>, members: &Members<'_>) -> Result<Event, MemberError> {
                match kind {
                    $( Kind::$kind => {
                        let bad = |key| MemberError::Nonsense { kind: $kname, key };
                        let missing = |key| MemberError::Missing { kind: $kname, key };
                        let mut event = Err(missing(""));
                        $(
                            if event.is_err() {
                                let layout = || {
                                    $(
                                        let $field: $type = declare::read!(
                                            members, bad, missing, $field: $type, $unit $(($($uarg),+))? $(, $key $(if $cond)?)*
                                        );
                                    )*
                                    $( let $e = <$etype>::read(id).ok_or(missing(key::ENDPOINT))?; )?
                                    Ok(Event::$name { $($e,)? $($field),* })
                                };
                                event = layout();
                            }
                        )+
                        event
                    } )*
                }
            }

            /// An event of the given variant, made of numbers from `next`. It can be read back from its record and its
            /// line.
            #[cfg(test)]
            pub(crate) fn draw(variant: usize, next: &mut dyn FnMut() -> u64) -> Event {
                let mut at = 0..;
                $($(
                    if at.next() == Some(variant % Event::VARIANTS) {
                        $(
                            let $field: $type = {
                                let mut words = [0; WORDS];
                                let place = declare::place!($word $([$low..$high])?);
                                let $field = Unit::<$type>::draw(&$unit $(($($uarg),+))?, next);
                                $field.store(place, &mut words);
                                let $field = <$type>::load(place, &words).unwrap();
                                if declare::shown!($($key $(if $cond)?),*) { $field } else { <$type>::blank() }
                            };
                        )*
                        $(
                            let id = next() as u32;
                            let word = if id % 4 == 0 { NO_ENDPOINT } else { id % NO_ENDPOINT >> (id % 3 * 8) };
                            let $e = <$etype>::of(word, declare::condition!($($econd)?));
                        )?
                        return Event::$name { $($e,)? $($field),* };
                    }
                )+)*
                unreachable!()
            }

            /// The number of layouts of all kinds.
            #[cfg(test)]
            pub(crate) const VARIANTS: usize = [$($($number + 0 * stringify!($name).len()),+),*].len();
        }

        /// The kinds' entries in the schema.
        #[allow(unused_variables, reason = "not all fields are arguments of units")]
        pub(crate) fn kinds() -> Vec<serde_json::Value> {
            vec![$(
                schema::kind(Kind::$kind, vec![$( {
                    $( let $field = <$type>::blank(); )*
                    let fields = vec![$( declare::field_schema!(
                        $field: $type, $unit $(($($uarg),+))?, declare::place!($word $([$low..$high])?)
                        $(, $key $(if $cond)?)* $(=> $dkey)?
                    ) ),*];
                    let endpoint = declare::endpoint_schema!($($etype $(where $econd)?)?);
                    schema::layout(concat!($($doc, "\n"),+), endpoint, fields)
                } ),+])
            ),*]
        }
    };
}

/// The endpoint of an event, if it is about one.
macro_rules! id {
    () => {
        None::<u32>
    };
    ($e:ident) => {
        $e.id()
    };
}

/// An optional condition, as an `Option`.
macro_rules! condition {
    () => {
        None
    };
    ($condition:expr) => {
        Some($condition)
    };
}

/// Whether a key is there: always, or under its condition.
macro_rules! given {
    () => {
        true
    };
    ($condition:expr) => {
        $condition
    };
}

/// Whether one of several keys is there. A field whose unit writes its own members is always there.
#[cfg(test)]
macro_rules! shown {
    () => {
        true
    };
    ($($key:literal $(if $condition:expr)?),+) => {
        false $(|| declare::given!($($condition)?))+
    };
}

/// A place in the record.
macro_rules! place {
    ($word:ident) => {
        const { word::$word }
    };
    ($word:ident [$low:literal .. $high:literal]) => {
        const { word::$word.bits($low, $high) }
    };
}

/// Writes a field, and the member that follows from it.
macro_rules! write {
    ($how:ident, $out:ident, $field:ident : $type:ty, $unit:expr, [$before:literal, $after:literal]) => {
        Unit::<$type>::$how(&$unit, "", $field, $out)
    };
    (
        $how:ident, $out:ident, $field:ident : $type:ty, $unit:expr, [$before:literal, $after:literal]
        $(, $key:literal $(if $condition:expr)?)+
    ) => {
        if Unit::<$type>::is_there(&$unit, &$field) {
            $(
                if declare::given!($($condition)?) {
                    Unit::<$type>::$how(&$unit, concat!($before, $key, $after), $field, $out);
                }
            )+
        }
    };
    (
        $how:ident, $out:ident, $field:ident : $type:ty, $unit:expr, [$before:literal, $after:literal],
        $key:literal $(if $condition:expr)? => $dkey:literal $dunit:ident ($($darg:expr),+)
    ) => {
        if declare::given!($($condition)?) {
            Unit::<$type>::$how(&$unit, concat!($before, $key, $after), $field, $out);
            $dunit($($darg),+).$how(concat!($before, $dkey, $after), $out);
        }
    };
}

/// Reads a field. A missing one has its default, if it may be missing.
macro_rules! read {
    ($members:ident, $bad:ident, $missing:ident, $field:ident : $type:ty, $unit:expr) => {
        match Unit::<$type>::read(&$unit, "", $members) {
            Found::Is(value) => value,
            Found::Nothing => <$type>::blank(),
            Found::Nonsense => return Err($bad(stringify!($field))),
        }
    };
    (
        $members:ident, $bad:ident, $missing:ident, $field:ident : $type:ty, $unit:expr
        $(, $key:literal $(if $condition:expr)?)+
    ) => {{
        let mut found = None;
        $(
            match Unit::<$type>::read(&$unit, $key, $members) {
                Found::Is(value) if found.is_none() => found = Some(value),
                Found::Nonsense => return Err($bad($key)),
                _ => {}
            }
        )+
        let is_missing = found.is_none();
        let $field: $type = found.unwrap_or_else(Stored::blank);
        if !Unit::<$type>::accepts(&$unit, &$field) {
            return Err($bad(stringify!($field)));
        }
        $(
            if is_missing && declare::given!($($condition)?) && Unit::<$type>::is_there(&$unit, &$field) {
                return Err($missing($key));
            }
        )+
        $field
    }};
}

/// The endpoint's entry in the schema.
macro_rules! endpoint_schema {
    () => {
        "never"
    };
    (u32) => {
        "always"
    };
    ($type:ty) => {
        "optional"
    };
    ($type:ty where $condition:expr) => {
        stringify!($condition)
    };
}

/// A field's entry in the schema.
macro_rules! field_schema {
    (
        $field:ident : $type:ty, $unit:expr, $place:expr
        $(, $key:literal $(if $condition:expr)?)* $(=> $dkey:literal)?
    ) => {
        schema::field(
            Unit::<$type>::schema(&$unit),
            stringify!($type),
            $place,
            &[$(($key, declare::condition_schema!($($condition)?))),*],
            declare::condition_schema!($($dkey)?),
        )
    };
}

/// A condition's text in the schema.
macro_rules! condition_schema {
    () => {
        None
    };
    ($name:literal) => {
        Some($name)
    };
    ($condition:expr) => {
        Some(stringify!($condition))
    };
}

#[cfg(test)]
pub(crate) use shown;
pub(crate) use {condition, condition_schema, endpoint_schema, events, field_schema, given, id, place, read, write};
