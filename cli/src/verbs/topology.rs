//! `atomizer topology`.

use std::collections::HashSet;

use anyhow::bail;
use atomizer::{AtomId, ResultsId};
use atomizer_programs::{Exit, cli, say};
use atomizer_rabbitmq::{Argument, Arguments as Declared, Found, Object, Plan};
use clap::Subcommand;
use serde_json::{Map, Value, json};

use crate::{management::Management, output::one_line, shared::Shared};

/// Prints, checks or makes what is needed on the broker.
///
/// It is the same that nodes make for themselves unless they are told not to (`RabbitMq::topology`). docs/topology.md
/// has the reasons.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer topology print --atom double --json
  atomizer topology check --atom double --atom mail --management http://localhost:15672
  atomizer topology apply --atom double --delays

With --json an object is {\"kind\": \"exchange\", \"name\", \"type\", \"arguments\"}, {\"kind\": \"queue\", \"name\", \"arguments\"} or
{\"kind\": \"binding\", \"source\", \"destination\", \"to\", \"key\"}, with \"found\" and \"detail\" when it was checked.
All are durable. check exits with 1 when something is missing or of no use as it is.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Prints it, in the order in which it can be made; no broker is asked.
    Print(For),
    /// Compares it with what is there, and changes nothing.
    ///
    /// Over AMQP nobody can ask for bindings, and only who may declare something learns whether its arguments are
    /// right. With the management API bindings are compared as well.
    Check(Check),
    /// Makes what is missing. Nothing that is there is changed.
    Apply(For),
}

/// What it is needed for.
#[derive(Debug, clap::Args)]
struct For {
    /// An atom that is to be served; may be said several times.
    #[arg(long, value_parser = |text: &str| AtomId::try_new(text))]
    atom: Vec<AtomId>,
    /// A result address that is to be used; may be said several times.
    #[arg(long, value_name = "NAME", value_parser = |text: &str| ResultsId::try_new(text))]
    results: Vec<ResultsId>,
    /// With what delays need: `send --after`, and policies that wait for more than 10 s. Whoever needs it first makes it,
    /// where nodes make things.
    #[arg(long)]
    delays: bool,
}

#[derive(Debug, clap::Args)]
struct Check {
    #[command(flatten)]
    needed: For,
    /// The broker's management API: http://user:password@host:15672 [default user: guest].
    #[arg(
        long,
        value_name = "URL",
        env = "ATOMIZER_MANAGEMENT_URL",
        hide_env_values = true,
        value_parser = cli::Secret::<Management>::new()
    )]
    management: Option<Management>,
}

impl For {
    fn plan(&self, shared: &Shared) -> anyhow::Result<Plan> {
        let plan = shared.rabbit()?.topology_plan(&self.atom, &self.results);
        Ok(if self.delays { plan.delays() } else { plan })
    }
}

pub(crate) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    match &arguments.verb {
        Verb::Print(needed) => print(shared, &needed.plan(shared)?),
        Verb::Check(check) => {
            let plan = check.needed.plan(shared)?;
            compare(shared, &plan, check.management.as_ref()).await
        }
        Verb::Apply(needed) => {
            let plan = needed.plan(shared)?;
            shared.rabbit()?.operator().apply(&plan).await?;
            let count = plan.objects().len();
            if shared.json {
                say(json!({ "objects": count }))?;
            } else {
                say(format_args!("all {count} objects are there"))?;
            }
            Ok(Exit::Done)
        }
    }
}

fn print(shared: &Shared, plan: &Plan) -> anyhow::Result<Exit> {
    for object in plan.objects() {
        if shared.json {
            say(Value::from(described(object)))?;
        } else {
            say(line(object))?;
        }
    }
    Ok(Exit::Done)
}

async fn compare(
    shared: &Shared,
    plan: &Plan,
    management: Option<&Management>,
) -> anyhow::Result<Exit> {
    let mut checked = shared.rabbit()?.operator().check(plan).await?;
    if let Some(management) = management {
        compare_bindings(shared, &mut checked, management).await?;
    }
    for (object, found) in &checked {
        if shared.json {
            let mut described = described(object);
            let (word, detail) = words(found);
            described.insert("found".to_owned(), word.into());
            described.insert("detail".to_owned(), detail.into());
            say(Value::from(described))?;
        } else if is_news(found) {
            let (word, detail) = words(found);
            let detail =
                if detail.is_empty() { detail } else { format!(": {}", one_line(&detail)) };
            say(format_args!("{word:<10} {}{detail}", title(object)))?;
        }
    }
    let count = |is: fn(&Found) -> bool| checked.iter().filter(|(_, found)| is(found)).count();
    if !shared.json {
        let as_planned = count(|found| *found == Found::AsPlanned);
        let unknown = count(|found| matches!(found, Found::There | Found::Unknown));
        say(format_args!("{as_planned} of {} are as planned, {unknown} unknown", checked.len()))?;
        if unknown > 0 && management.is_none() {
            eprintln!("(bindings can only be compared with --management)");
        }
    }
    match count(|found| matches!(found, Found::Missing | Found::Unsafe(_))) {
        0 => Ok(Exit::Done),
        wrong => bail!(
            "{wrong} are missing or of no use: 'atomizer topology apply' makes what is missing; what is of no use must \
             be deleted first, with what is in it"
        ),
    }
}

/// Looks for bindings, which only the management API tells.
async fn compare_bindings(
    shared: &Shared,
    checked: &mut [(Object, Found)],
    management: &Management,
) -> anyhow::Result<()> {
    let listed = management.list("bindings", &shared.vhost()).await?;
    let text = |binding: &Value, field: &str| {
        binding.get(field).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let there: HashSet<_> = listed
        .iter()
        .map(|binding| {
            ["source", "destination", "destination_type", "routing_key"]
                .map(|field| text(binding, field))
        })
        .collect();
    for (object, found) in checked {
        if let Object::Binding { source, destination, to, key } = object {
            let binding =
                [source.clone(), destination.clone(), to.as_str().to_owned(), key.clone()];
            let is_there = there.contains(&binding);
            *found = if is_there { Found::AsPlanned } else { Found::Missing };
        }
    }
    Ok(())
}

/// Whether it is worth a line; that a binding cannot be compared is said once for all.
fn is_news(found: &Found) -> bool {
    !matches!(found, Found::AsPlanned | Found::Unknown)
}

/// A word for it, and what there is to say beside it.
pub(super) fn words(found: &Found) -> (&'static str, String) {
    match found {
        Found::AsPlanned => ("as_planned", String::new()),
        Found::There => ("there", "its arguments may not be asked for".to_owned()),
        Found::Missing => ("missing", String::new()),
        Found::Differs(how) => ("differs", how.join("; ")),
        Found::Unsafe(how) => ("unsafe", how.clone()),
        _ => ("unknown", String::new()),
    }
}

/// What it is and what it is called.
pub(super) fn title(object: &Object) -> String {
    match object {
        Object::Exchange { name, .. } => format!("exchange {name}"),
        Object::Queue { name, .. } => format!("queue {name}"),
        Object::Binding { source, destination, to, key } => {
            format!("binding {source} -> {} {destination} key={key}", to.as_str())
        }
        other => format!("{other:?}"),
    }
}

fn line(object: &Object) -> String {
    let with = |arguments: &Declared| {
        let texts = arguments.iter().map(|(name, value)| format!(" {name}={value}"));
        texts.collect::<String>()
    };
    match object {
        Object::Exchange { kind, arguments, .. } => {
            format!("{} type={}{}", title(object), kind.as_str(), with(arguments))
        }
        Object::Queue { arguments, .. } => format!("{}{}", title(object), with(arguments)),
        _ => title(object),
    }
}

fn described(object: &Object) -> Map<String, Value> {
    let with = |arguments: &Declared| {
        let value = |value| match value {
            Argument::Number(number) => Value::from(number),
            other => Value::from(other.to_string()),
        };
        let arguments = arguments.iter().map(|(name, argument)| (name.to_owned(), value(argument)));
        Value::Object(arguments.collect())
    };
    let described = match object {
        Object::Exchange { name, kind, arguments } => json!({
            "kind": "exchange", "name": name, "type": kind.as_str(), "arguments": with(arguments),
        }),
        Object::Queue { name, arguments, .. } => json!({
            "kind": "queue", "name": name, "arguments": with(arguments),
        }),
        Object::Binding { source, destination, to, key } => json!({
            "kind": "binding", "source": source, "destination": destination, "to": to.as_str(),
            "key": key,
        }),
        other => json!({ "kind": format!("{other:?}") }),
    };
    match described {
        Value::Object(described) => described,
        _ => Map::new(),
    }
}
